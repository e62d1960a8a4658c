"""Huge pages for what a step on the CPU goes through: shards, gradients and moments.

A step reads and writes gigabytes in one pass, and with pages of 4 KiB every page of every array costs a look-up: the C++
kernel is about a tenth faster on pages of 2 MiB (``make bench``). PyTorch's own THP_MEM_ALLOC_ENABLE=1 does the same for
all memory of a process, temporaries included. See madvise(2) for MADV_HUGEPAGE and MADV_COLLAPSE.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SWITCH = "BLOCKWISE_LR_HUGE_PAGES"
_SIZE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_huge_pages(*tensors: torch.Tensor) -> None:
    """Asks the kernel to put the tensors' memory on huge pages, now where it can, by and by where it cannot.

    Values stay as they are, and so does the memory in use. Does nothing for tensors that are small, not on the CPU, pinned
    or shared between processes, where the machine has huge pages turned off (``never``), and with
    ``BLOCKWISE_LR_HUGE_PAGES=0``.
    """
    advise = _madvise()
    if advise is None:
        return
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.is_pinned() or tensor.is_shared():
            continue
        begin = -(-tensor.data_ptr() // _SIZE) * _SIZE
        end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _SIZE * _SIZE
        if end > begin:  # a refusal only means pages as they were
            advise(begin, end - begin, _MADV_HUGEPAGE)
            advise(begin, end - begin, _MADV_COLLAPSE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            return None
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes, madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return madvise
