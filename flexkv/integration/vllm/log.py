"""Lets flexkv's lines appear in vLLM's log."""

from __future__ import annotations

import logging


def join_vllms_log() -> None:
    """Unless flexkv has a log of its own, it goes where vLLM's goes, from the same level on."""
    own, theirs = logging.getLogger("flexkv"), logging.getLogger("vllm")
    if own.handlers or own.level or not theirs.handlers:
        return
    for handler in theirs.handlers:
        own.addHandler(handler)
    own.setLevel(theirs.level)
    own.propagate = False  # the root's handlers would say it once more
