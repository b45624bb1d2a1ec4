"""The journal: what it gives back is what was there, or a shorter history of it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from flexkv.blocks import Blocks
from flexkv.tiers.ssd_frames import (
    Kept,
    Replay,
    added,
    cleared,
    framed,
    removed,
    unframed,
)
from flexkv.tiers.ssd_journal import DiskCalls, Journal
from tests.tiers.disks import some_blocks

if TYPE_CHECKING:
    from pathlib import Path

NUM_SLOTS = 64
NUM_FLIPS = 20_000


def state(kept: list[Kept]) -> dict[bytes, tuple[int, int]]:
    """Where each block is, and its sum."""
    return {
        key: place
        for run in kept
        for key, *place in zip(run.blocks, run.slots, run.sums, strict=True)
    }


def replayed(records: list[bytes] | memoryview) -> dict[bytes, tuple[int, int]]:
    replay = Replay(NUM_SLOTS)
    whole = (
        records if isinstance(records, memoryview) else memoryview(b"".join(map(framed, records)))
    )
    for record, _ in unframed(whole):
        replay.take(record)
    return state(replay.kept())


def history(seed: int, num_steps: int) -> tuple[list[bytes], list[dict[bytes, tuple[int, int]]]]:
    """Records of a tier that comes and goes, and what is there after each."""
    chance = random.Random(seed)
    records: list[bytes] = []
    here: dict[bytes, list[int]] = {}
    runs: list[tuple[int, int]] = []
    free = set(range(NUM_SLOTS))
    states = [{}]
    first = 0
    for _ in range(num_steps):
        size = chance.randint(1, 6)
        if len(free) >= size and chance.random() < 0.7:
            slots = chance.sample(sorted(free), size)
            free -= set(slots)
            sums = [chance.getrandbits(64) for _ in slots]
            blocks = some_blocks(first, size)
            records.append(added(blocks, slots, sums))
            runs.append((first, size))
            here |= {key: [s, c] for key, s, c in zip(blocks, slots, sums, strict=True)}
            first += size
        elif runs and chance.random() < 0.95:
            start, size = runs.pop(chance.randrange(len(runs)))
            keep = chance.randrange(size)
            gone = some_blocks(start + keep, size - keep)
            records.append(removed(gone))
            free |= {here.pop(key)[0] for key in gone}
            if keep:
                runs.append((start, keep))
        else:
            records.append(cleared())
            here, runs, free = {}, [], set(range(NUM_SLOTS))
        states.append({key: list(place) for key, place in here.items()})
    return records, states


def test_a_replay_gives_what_is_there() -> None:
    records, states = history(1, 300)
    for num_records in range(0, 301, 7):
        assert replayed(records[:num_records]) == states[num_records]


def test_a_journal_cut_at_any_byte_gives_a_shorter_history() -> None:
    records, states = history(2, 40)
    whole = b"".join(map(framed, records))
    ends = [0]
    for record in records:
        ends.append(ends[-1] + len(framed(record)))
    for cut in range(len(whole) + 1):
        num_whole = sum(end <= cut for end in ends) - 1
        assert replayed(memoryview(whole[:cut])) == states[num_whole]


def test_a_flipped_bit_anywhere_gives_a_shorter_history() -> None:
    records, states = history(3, 25)
    whole = bytearray(b"".join(map(framed, records)))
    ends = [0]
    for record in records:
        ends.append(ends[-1] + len(framed(record)))
    chance = random.Random(3)
    for _ in range(NUM_FLIPS):
        bit = chance.randrange(8 * len(whole))
        whole[bit // 8] ^= 1 << bit % 8
        num_whole = sum(end <= bit // 8 for end in ends) - 1
        assert replayed(memoryview(whole)) == states[num_whole]
        whole[bit // 8] ^= 1 << bit % 8


def test_all_fields_of_a_run_come_back() -> None:
    blocks = some_blocks(5, 4, parent=some_blocks(4, 1).key(0))
    hashes = blocks.tokens_hashes(lambda _: [1, 2, 3, 2**64 - 1])
    replay = Replay(NUM_SLOTS)
    replay.take(memoryview(added(blocks, [9, 8, 7, 6], [1, 2, 3, 4], hashes)))
    replay.take(memoryview(added(some_blocks(4, 1), [1], [1])))
    _, run = replay.kept()
    assert (run.parent, run.parent_at) == (0, 1)
    assert run.blocks == blocks
    assert (run.blocks.namespace, run.blocks.lora) == ("a", None)
    assert run.blocks.token_ids == blocks.token_ids
    assert run.blocks.tokens_hashes(lambda _: pytest.fail("they are known")) == hashes
    assert list(run.slots) == [9, 8, 7, 6]


def test_extra_keys_come_back_and_what_follows_them_stays_opaque() -> None:
    plain = some_blocks(5, 4)
    extra = (None, None, (("image", 3), b"embeds", "x"), None)
    whole = Blocks(
        plain.packed_keys(), bytes(plain.token_ids), tokens_per_block=2, extra_keys=extra
    )
    for start in range(4):
        replay = Replay(NUM_SLOTS)
        blocks = whole[start:]
        if start:
            replay.take(memoryview(added(whole[:start], range(9, 9 + start), [0] * start)))
        replay.take(memoryview(added(blocks, range(len(blocks)), [0] * len(blocks))))
        run = replay.kept()[-1]
        assert run.blocks.extra_keys == blocks.extra_keys
        assert run.blocks.num_plain == blocks.num_plain == max(0, 2 - start)


def test_a_slot_that_two_blocks_claim_is_the_later_ones() -> None:
    records = [added(some_blocks(0, 3), [0, 1, 2], [5, 5, 5]), added(some_blocks(7, 1), [1], [6])]
    keys = {key[-1] for key in replayed(records)}
    assert keys == {0, 7}  # what followed the lost one can't be reached


def test_slots_beyond_the_tier_are_not_taken() -> None:
    assert replayed([added(some_blocks(0, 2), [0, NUM_SLOTS], [1, 1])]).keys() == {
        some_blocks(0, 1).key(0)
    }


def test_parents_come_before_children_and_orphans_do_not_come() -> None:
    root, child, orphan = some_blocks(0, 3), some_blocks(10, 2, some_blocks(1, 1).key(0)), None
    orphan = some_blocks(20, 2, some_blocks(99, 1).key(0))
    replay = Replay(NUM_SLOTS)
    for at, blocks in ((0, child), (5, orphan), (10, root)):
        slots = range(at, at + len(blocks))
        replay.take(memoryview(added(blocks, slots, [0] * len(blocks))))
    assert [run.blocks for run in replay.kept()] == [root, child]


def opened(folder: Path, about: dict[str, object] | None = None) -> tuple[Journal, list[Kept]]:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, about or {"model": "tiny"}, DiskCalls())
    return journal, journal.load(NUM_SLOTS)


def test_a_journal_goes_on_after_a_restart(tmp_path: Path) -> None:
    records, states = history(4, 60)
    for start in range(0, 60, 20):
        journal, kept = opened(tmp_path)
        assert state(kept) == states[start]
        journal.append(records[start : start + 20])
        journal.close()
    assert state(opened(tmp_path)[1]) == states[60]


def test_what_follows_a_torn_tail_is_not_lost(tmp_path: Path) -> None:
    records, states = history(5, 20)
    journal, _ = opened(tmp_path)
    journal.append(records[:10])
    journal.close()
    (path,) = tmp_path.glob("journal-*")
    with path.open("ab") as file:
        file.write(framed(records[10])[:-3])
    journal, kept = opened(tmp_path)
    assert state(kept) == states[10]
    journal.append(records[10:])
    journal.close()
    assert state(opened(tmp_path)[1]) == states[20]


def test_a_snapshot_takes_what_happens_meanwhile(tmp_path: Path) -> None:
    records, _ = history(6, 30)
    journal, _ = opened(tmp_path)
    journal.append(records)
    journal.start_snapshot()
    journal.append_snapshot([added(some_blocks(100, 2), [0, 1], [7, 8])])
    journal.append([removed(some_blocks(101, 1))])
    before = journal.nbytes
    journal.finish_snapshot()
    assert journal.nbytes < before
    journal.append([added(some_blocks(200, 1), [1], [9])])
    journal.close()
    keys = {key[-1] for key in state(opened(tmp_path)[1])}
    assert keys == {100, 200}


def test_an_unfinished_snapshot_changes_nothing(tmp_path: Path) -> None:
    records, states = history(7, 10)
    journal, _ = opened(tmp_path)
    journal.append(records)
    journal.start_snapshot()
    journal.append_snapshot([cleared()])
    journal.close()
    journal, kept = opened(tmp_path)
    assert state(kept) == states[10]
    assert len(list(tmp_path.iterdir())) == 1
    journal.close()


def test_another_model_starts_empty_and_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, _ = opened(tmp_path)
    journal.append([added(some_blocks(0, 2), [0, 1], [1, 1])])
    journal.close()
    journal, kept = opened(tmp_path, {"model": "tiny", "weights_id": "v2"})
    assert kept == []
    assert "weights_id None, not 'v2'" in caplog.text
    journal.close()
    assert opened(tmp_path)[1] == []  # gone for good, not only hidden


def test_a_damaged_header_starts_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, _ = opened(tmp_path)
    journal.append([added(some_blocks(0, 2), [0, 1], [1, 1])])
    journal.close()
    (path,) = tmp_path.glob("journal-*")
    damaged = bytearray(path.read_bytes())
    damaged[12] ^= 1
    path.write_bytes(damaged)
    assert opened(tmp_path)[1] == []
    assert "damaged" in caplog.text
