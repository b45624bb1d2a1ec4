"""Copies by the GPU's copy engines, straight through CUDA's runtime: a few us less than torch."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

MAX_STEP = 2**31 - 1  # of copy_rows

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2


def copy(target: int, source: int, nbytes: int, *, to_host: bool, stream: int) -> None:
    """Begin to copy pinned memory on ``stream``, a handle of CUDA's.

    Raises:
        RuntimeError: it can't.
    """
    kind = _DEVICE_TO_HOST if to_host else _HOST_TO_DEVICE
    code = _runtime().cudaMemcpyAsync(target, source, nbytes, kind, stream)
    if code:
        raise _error(code, f"cudaMemcpyAsync of {nbytes} bytes")


def copy_rows(
    host: int, gpu: int, *, step: int, nbytes: int, number: int, to_host: bool, stream: int
) -> None:
    """As ``copy``, of ``number`` rows: apart by ``step`` on the GPU, back to back on the host.

    Raises:
        RuntimeError: it can't.
    """
    copy_2d, step = _runtime().cudaMemcpy2DAsync, max(step, nbytes)
    if to_host:
        code = copy_2d(host, nbytes, gpu, step, nbytes, number, _DEVICE_TO_HOST, stream)
    else:
        code = copy_2d(gpu, step, host, nbytes, nbytes, number, _HOST_TO_DEVICE, stream)
    if code:
        raise _error(code, f"cudaMemcpy2DAsync of {number} times {nbytes} bytes")


def _error(code: int, what: str) -> RuntimeError:
    runtime = _runtime()
    runtime.cudaGetLastError()  # or the next one who asks is told of it
    reason = runtime.cudaGetErrorString(code).decode()
    return RuntimeError(f"{what} failed: {reason} ({code})")


@cache
def _runtime() -> Any:
    """The runtime that torch has loaded. Its calls keep the GIL: to get it back may take 5 ms."""
    found = re.search(r"\S*/libcudart[^/\s]*\.so[.\d]*", Path("/proc/self/maps").read_text())
    if found is None:
        raise RuntimeError("torch has loaded no CUDA runtime (libcudart.so)")
    runtime = ctypes.PyDLL(found[0])
    runtime.cudaMemcpyAsync.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    runtime.cudaMemcpy2DAsync.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime
