"""Huge pages under the optimizers' tensors, where the machine has them."""

import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, map_blocks
from blockwise_lr.kernels import huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COLLAPSES = (
    ENABLED.exists()
    and "[never]" not in ENABLED.read_text()
    and tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2]) >= (6, 1)
)
ROWS, WIDTH = 16384, 512
BYTES = ROWS * WIDTH * 4  # 32 MiB


def on_small_pages(value):
    """A (ROWS, WIDTH) tensor on memory of its own."""
    memory = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(ROWS, WIDTH).fill_(value)


def huge_bytes():
    """How much of this process's memory lies on huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"AnonHugePages:\s+(\d+) kB", text)[1])


@pytest.mark.skipif(not COLLAPSES, reason="no huge pages here, or Linux before 6.1, which makes them by and by")
@pytest.mark.parametrize("kind", [BlockwiseAdamW, BlockwiseAdamMini])
def test_parameters_and_gradients_move_there(kind):
    module = torch.nn.ModuleDict({"wte": torch.nn.Embedding(ROWS, WIDTH, _weight=on_small_pages(0.25))})
    weight = module["wte"].weight
    weight.grad = on_small_pages(0.5)
    optimizer = kind(module.named_parameters(), block_map=map_blocks(module), lr=0.0)
    before = huge_bytes()
    optimizer.step()
    assert huge_bytes() - before > 1.5 * BYTES
    assert (weight == 0.25).all() and (weight.grad == 0.5).all()


@pytest.mark.skipif(not COLLAPSES, reason="no huge pages here, or Linux before 6.1, which makes them by and by")
def test_the_switch_turns_it_off(monkeypatch):
    tensor = on_small_pages(1.0)
    before = huge_bytes()
    monkeypatch.setenv(huge_pages.SWITCH, "0")
    huge_pages._madvise.cache_clear()
    huge_pages.use_huge_pages(tensor)
    assert huge_bytes() - before < BYTES / 4
    monkeypatch.undo()
    huge_pages._madvise.cache_clear()
    huge_pages.use_huge_pages(tensor)
    assert huge_bytes() - before > BYTES / 2 and (tensor == 1).all()


def test_what_cannot_move_stays():
    huge_pages.use_huge_pages(
        torch.ones(3), torch.empty(0), torch.empty(4_000_000, device="meta"), torch.ones(4_000_000).share_memory_()
    )
