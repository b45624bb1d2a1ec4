"""What a caller may hand to the engine."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from flexkv.blocks import Blocks, KVLayout
from flexkv.config import Config
from flexkv.errors import InputError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_settings(config: Config, layout: KVLayout) -> None:
    """An engine can be made with them.

    Raises:
        InputError: one is something else.
        LayoutError: they differ in their tokens per block.
    """
    if not isinstance(config, Config):
        raise InputError(
            f"config is {type(config).__name__}: make it with Config.load or Config.from_mapping"
        )
    if not isinstance(layout, KVLayout):
        raise InputError(f"layout is {type(layout).__name__}: make it with KVLayout.of_model")
    if config.tokens_per_block != layout.tokens_per_block:
        raise LayoutError(
            f"tokens_per_block is {config.tokens_per_block} in the settings but "
            f"{layout.tokens_per_block} in the layout: they must be equal"
        )


def check_chain(blocks: Blocks, tokens_per_block: int, key_nbytes: int) -> None:
    """``blocks`` are a whole chain of the engine's kind; ``key_nbytes`` 0: any width of key.

    Raises:
        InputError: they are not.
    """
    if not isinstance(blocks, Blocks):
        raise InputError(f"blocks is {type(blocks).__name__}: make it with blocks_of")
    if blocks.tokens_per_block != tokens_per_block:
        raise InputError(
            f"the blocks have {blocks.tokens_per_block} tokens each, the engine's "
            f"{tokens_per_block}: pass tokens_per_block to blocks_of"
        )
    if blocks.parent is not None:
        raise InputError("the blocks do not begin their chain: pass it from its first block")
    if key_nbytes not in {0, blocks.key_nbytes}:
        raise InputError(
            f"keys of {blocks.key_nbytes} bytes do not go with the {key_nbytes} of the blocks "
            "before: one engine keeps one kind of key"
        )


def checked_block_ids(
    gpu_block_ids: Sequence[int], num_blocks: int, first: int, num_gpu_blocks: int
) -> list[int]:
    """The ids as integers: one for each of the blocks from ``first`` on, or for the first of them.

    Raises:
        InputError: they do not go with the blocks or with the cache.
    """
    try:
        block_ids = [operator.index(block_id) for block_id in gpu_block_ids]
    except TypeError as error:
        raise InputError(f"gpu_block_ids must be integers: {error}") from None
    if not 0 <= first <= num_blocks:
        raise InputError(f"first is {first}, but there are {num_blocks} blocks: give 0 to that")
    if len(block_ids) > num_blocks - first:
        raise InputError(
            f"{len(block_ids)} GPU block ids for {num_blocks - first} blocks (first={first})"
        )
    if block_ids and not 0 <= min(block_ids) <= max(block_ids) < num_gpu_blocks:
        wrong = next(i for i in block_ids if not 0 <= i < num_gpu_blocks)
        raise InputError(f"GPU block id {wrong} is not in the cache of {num_gpu_blocks} blocks")
    if len(set(block_ids)) != len(block_ids):
        twice = next(i for i in block_ids if block_ids.count(i) > 1)
        raise InputError(f"GPU block id {twice} occurs twice: each block needs its own")
    return block_ids
