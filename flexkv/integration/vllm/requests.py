"""What the scheduler role knows of a request: its chain, and what became of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flexkv.blocks import Blocks
from flexkv.integration.vllm.extra_keys import extra_keys_of, has_extra_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.blocks import ExtraKeys
    from flexkv.engine.tiering import Pin


_HANDFUL = 8  # blocks: each store costs about a millisecond, whatever its size


class RequestState:
    """One request of vLLM, from its arrival to its end.

    ``request`` is vLLM's own object, which is only read: its ``block_hashes`` are the block keys.
    """

    def __init__(self, request: Any, block_size: int) -> None:
        self.request = request
        self.block_size = block_size
        self.num_local = 0  # blocks that the GPU had at the latest look-up
        self.num_handed = 0  # leading blocks handed over to be stored
        self.pin: Pin | None = None
        self.is_offered = False  # a load of what is behind ``num_local``
        self.is_counted = False
        self.is_running = False  # it has been scheduled since it last waited
        self.num_begun_with = 0  # tokens that it did not compute itself since then
        self.is_loading = False
        self.was_promised = False  # a load, since it last ran
        self._keys = bytearray()
        self._token_ids = bytearray()
        self._extra_keys: list[ExtraKeys] = []
        self._chain = Blocks(b"", b"", tokens_per_block=block_size)

    def chain(self, num_blocks: int | None = None) -> Blocks:
        """The request's first ``num_blocks`` blocks, at most as many as have a hash."""
        hashes: Sequence[bytes] = self.request.block_hashes
        num_known = len(self._chain)
        if len(hashes) != num_known or (num_known and hashes[-1] != self._chain.key(num_known - 1)):
            self._chain = self._learned(hashes)
        if num_blocks is None or num_blocks >= len(self._chain):
            return self._chain
        return self._chain.part(0, num_blocks)

    def num_storable(self) -> int:
        """Blocks whose KV is written for sure: processed, not merely scheduled, tokens.

        What a request begins with may be other requests' blocks that are being computed in the
        very same step: it is written once a step of this request has been processed.
        """
        request = self.request
        num_processed = request.num_computed_tokens - request.num_in_flight_tokens
        if not self.is_running or num_processed <= self.num_begun_with:
            return 0
        num_tokens: int = min(num_processed, request.num_tokens - 1)
        return max(0, num_tokens) // self.block_size

    def has_news(self) -> bool:
        """Whether it is worth a store now: the prompt's blocks at once, others by the handful."""
        num_storable, num_handed = self.num_storable(), self.num_handed
        prompt = self.request.num_prompt_tokens // self.block_size
        if num_handed < min(num_storable, prompt):
            return True
        return num_storable - num_handed >= _HANDFUL

    def begin(self) -> None:
        """It is scheduled for the first time since it waited."""
        self.is_running = True
        self.was_promised = False
        self.num_begun_with = self.request.num_computed_tokens

    def restart(self) -> None:
        """It waits, without GPU blocks: not scheduled yet, or preempted."""
        self.num_handed = 0
        self.is_running = False

    def _learned(self, hashes: Sequence[bytes]) -> Blocks:
        if not hashes:
            return Blocks(b"", b"", tokens_per_block=self.block_size)
        width, num_tokens = len(hashes[0]), self.block_size
        known = min(len(self._keys) // width, len(hashes))
        while known and self._keys[(known - 1) * width : known * width] != hashes[known - 1]:
            known -= 1  # a streaming session has put other tokens there
        del self._keys[known * width :]
        del self._token_ids[known * num_tokens * 4 :]
        self._keys += b"".join(hashes[known:])
        tokens = self.request.all_token_ids[known * num_tokens : len(hashes) * num_tokens]
        self._token_ids += np.asarray(tokens, "<u4").tobytes()
        if has_extra_keys(self.request):
            del self._extra_keys[known:]
            self._extra_keys += extra_keys_of(self.request, num_tokens, known, len(hashes))
        lora = self.request.lora_request
        return Blocks(
            bytes(self._keys),
            bytes(self._token_ids),
            tokens_per_block=num_tokens,
            key_nbytes=width,
            namespace=self.request.cache_salt,
            lora=lora.lora_name if lora is not None else None,
            extra_keys=tuple(self._extra_keys) if any(self._extra_keys) else None,
        )
