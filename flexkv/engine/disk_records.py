"""What the journal is told of blocks on SSD, and how much room it needs for that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flexkv.errors import ConfigError
from flexkv.hashing import tokens_hashes
from flexkv.tiers.host import slot_stride
from flexkv.tiers.ssd_frames import MAX_NAMES_NBYTES, added, framed, max_entry_nbytes

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Sequence

    from flexkv.blocks import Blocks, KVLayout
    from flexkv.config import CacheConfig

_log = logging.getLogger(__name__)

MIN_JOURNAL_NBYTES = 1 << 20  # a smaller one is not worth a snapshot
_MAX_JOURNALS = 4  # the journal is at most twice what is live, and a third time while it is renewed
_TYPICAL_NBYTES = 60  # of a block in a run of many, but for its token ids
_NUM_BLOCKS_AT_ONCE = 512  # put together without a pause: 0.3 ms
_NUM_RECORDS_AT_ONCE = 64


def num_ssd_slots(cache: CacheConfig, layout: KVLayout) -> int:
    """How many blocks the SSD tier holds; ``ssd_cache_bytes`` covers the journal as well.

    Raises:
        ConfigError: not even one.
    """
    if cache.ssd_cache_bytes is None:
        return cache.num_ssd_blocks or 0
    nbytes = layout.num_ranks * slot_stride(layout.block_nbytes)
    nbytes += _MAX_JOURNALS * max_entry_nbytes(layout.tokens_per_block)
    num_slots = (cache.ssd_cache_bytes - _MAX_JOURNALS * MIN_JOURNAL_NBYTES) // nbytes
    if num_slots < 1:
        raise ConfigError(
            f"ssd_cache_bytes is {cache.ssd_cache_bytes}, but one block takes {nbytes} bytes, and "
            f"the journal up to {_MAX_JOURNALS * MIN_JOURNAL_NBYTES}: give it more"
        )
    return num_slots


class Recorder:
    """Makes records of resident blocks; with ``ssd_cache_bytes`` none that takes too much room."""

    def __init__(self, cache: CacheConfig, tokens_per_block: int) -> None:
        self._typical_nbytes = _TYPICAL_NBYTES + 4 * tokens_per_block
        self._max_nbytes = max_entry_nbytes(tokens_per_block)
        self._is_capped = cache.ssd_cache_bytes is not None
        self._has_warned = False

    def max_nbytes(self, num_resident: int, renewed_nbytes: int) -> int:
        """How long the journal may get; renewed last, it took ``renewed_nbytes``."""
        live_nbytes = max(self._typical_nbytes * num_resident, renewed_nbytes)
        return max(MIN_JOURNAL_NBYTES, 2 * live_nbytes)

    def records(
        self,
        blocks: Blocks,
        slots: Sequence[int],
        sums: Sequence[int],
        *,
        is_ranked: bool = False,
    ) -> list[bytes]:
        """One record, or none: then the blocks are not there after a restart."""
        record = added(blocks, slots, sums, tokens_hashes(blocks), is_ranked=is_ranked)
        if self._is_capped and len(framed(record)) > self._max_nbytes * len(blocks):
            if not self._has_warned:
                _log.warning(
                    "ssd: some blocks are not kept across restarts: their namespace, LoRA name "
                    "and extra keys take more than %d bytes a block, for which ssd_cache_bytes "
                    "leaves no room",
                    MAX_NAMES_NBYTES,
                )
            self._has_warned = True
            return []
        return [record]

    def batches(
        self,
        placed: Iterable[tuple[Blocks, array[int]]],
        sums: array[int],
        *,
        is_ranked: bool = False,
    ) -> Iterator[list[bytes]]:
        """Records of all of ``placed``; each step takes well below 1 ms. ``sums`` by slot."""
        records: list[bytes] = []
        num_blocks = 0
        for blocks, slots in placed:
            for start in range(0, len(blocks), _NUM_BLOCKS_AT_ONCE):
                part = blocks.part(start, min(start + _NUM_BLOCKS_AT_ONCE, len(blocks)))
                if records and num_blocks + len(part) > _NUM_BLOCKS_AT_ONCE:
                    yield records
                    records, num_blocks = [], 0
                part_slots = slots[start : start + len(part)]
                part_sums = [sums[slot] for slot in part_slots]
                records += self.records(part, part_slots, part_sums, is_ranked=is_ranked)
                num_blocks += len(part)
                if len(records) == _NUM_RECORDS_AT_ONCE:
                    yield records
                    records, num_blocks = [], 0
        yield records
