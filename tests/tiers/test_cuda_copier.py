"""What the CUDA copier decides before there is a GPU; the rest is in tests/gpu."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import torch

from flexkv.tiers.cuda import CudaPagedCopier, _blocks_touch
from flexkv.tiers.cuda_slices import Shape
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    import pytest

    from flexkv.tiers.cuda_channel import CudaChannel


def test_blocks_with_gaps_between_them_do_not_move_as_one() -> None:
    backing = torch.empty((7, 4, 1024), dtype=torch.int8)
    whole, gaps = segments_of({"a": backing}, 4), segments_of({"a": backing[:, :, :1000]}, 4)
    row = torch.empty((7, 4096), dtype=torch.int8)[:, :4000].unflatten(1, (4, 1000))
    assert _blocks_touch(whole, 4096)
    assert not _blocks_touch(whole, 8192)
    assert not _blocks_touch(gaps, 4096)
    assert not _blocks_touch(segments_of({"a": row}, 4), 4096)  # as far apart as their slots


class Unmakable:
    """A channel whose kernel can't be compiled."""

    def warm_up(self) -> None:
        raise OSError("no compiler")


def test_a_kernel_that_can_not_be_made_is_a_loss_and_no_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "none")
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: raised.append(hook.exc_type))
    paged = segments_of({"a": torch.empty((7, 4, 1024), dtype=torch.int8)}, 4)
    copier = CudaPagedCopier(paged, torch.device("cuda", 0))
    copier._shape = Shape(
        block_nbytes=4096,
        slot_stride=4096,
        slots_per_chunk=1,
        is_whole=True,
        row_nbytes=0,
        blocks_touch=True,
        has_kernel=True,
    )
    channel: Any = Unmakable()
    copier._begin_warm_up([cast("CudaChannel", channel)])
    copier._warm.result(60)
    for thread in threading.enumerate():
        if thread.name == "flexkv-warm-up":
            thread.join(60)
    assert copier.loss == "the kernel for cuda:0 can't be made: OSError('no compiler')"
    assert raised == [OSError]
