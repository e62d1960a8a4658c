"""Huge pages under the optimizers' tensors, where the machine has them."""
import os
import re
from pathlib import Path

import pytest
import torch

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, map_blocks
from blockwise_lr.kernels import huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COLLAPSES = (ENABLED.exists() and "[never]" not in ENABLED.read_text()
             and tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2]) >= (6, 1))


def huge(tensor):
    """Whether the memory mapping that holds the tensor's middle is on huge pages for the most part."""
    middle, inside = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(bound, 16) for bound in bounds.groups())
            inside = low <= middle < high
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024 > (high - low) / 2
    return False


def model():
    return torch.nn.ModuleDict({"wte": torch.nn.Embedding(8000, 512)})


@pytest.mark.skipif(not COLLAPSES, reason="no huge pages here, or Linux before 6.1, which makes them by and by")
@pytest.mark.parametrize("kind", [BlockwiseAdamW, BlockwiseAdamMini])
def test_parameters_gradients_and_moments_move_there(kind):
    module = model()
    weight = module["wte"].weight
    before, weight.grad = weight.detach().clone(), torch.full_like(weight, 0.5)
    optimizer = kind(module.named_parameters(), block_map=map_blocks(module), lr=0.0)
    optimizer.step()
    for tensor in (weight, weight.grad, optimizer.state[weight]["exp_avg"]):
        assert huge(tensor)
    assert torch.equal(weight, before) and (weight.grad == 0.5).all()


@pytest.mark.skipif(not COLLAPSES, reason="no huge pages here, or Linux before 6.1, which makes them by and by")
def test_the_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv(huge_pages.SWITCH, "0")
    huge_pages._madvise.cache_clear()
    tensor = torch.ones(4_000_000)
    huge_pages.use_huge_pages(tensor)
    assert not huge(tensor)
    monkeypatch.undo()
    huge_pages._madvise.cache_clear()
    huge_pages.use_huge_pages(tensor)
    assert huge(tensor) and (tensor == 1).all()


def test_what_cannot_move_stays(tmp_path):
    huge_pages.use_huge_pages(torch.ones(3), torch.empty(0), torch.empty(4_000_000, device="meta"),
                              torch.ones(4_000_000).share_memory_())
