"""What tests/checkpoint/saved/ holds, and how it was made: run as a script, in a checkout of the version that is to save.

``python tests/checkpoint/old_states.py FILE`` trains a small model with both optimizers and the paper's schedule, and
keeps weights and states in the middle and the weights at the end. Later versions must go on from the middle to the same
end.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import transformers

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, map_blocks
from blockwise_lr.schedules import BlockwiseWarmupCosine

KINDS = {"BlockwiseAdamW": BlockwiseAdamW, "BlockwiseAdamMini": BlockwiseAdamMini}
MIDDLE, END = 6, 10


def build(kind: str) -> tuple[torch.nn.Module, Any, Any]:
    """Model, optimizer and schedule."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=None, eos_token_id=None
        )
    )
    options = {"lr": 2e-3, "kernel": "reference", "block_lr_ratios": "paper"}  # what the default was until 0.2
    optimizer = KINDS[kind](model.named_parameters(), block_map=map_blocks(model), **options)
    return model, optimizer, BlockwiseWarmupCosine(optimizer, 12, 3)


def train(model: torch.nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    """Steps on random gradients."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        schedule.step()


def saved(kind: str) -> dict[str, Any]:
    """States in the middle of a run, and its end."""
    model, optimizer, schedule = build(kind)
    train(model, optimizer, schedule, range(MIDDLE))
    found = {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "schedule": schedule.state_dict(),
    }
    train(model, optimizer, schedule, range(MIDDLE, END))
    return {**found, "end": model.state_dict()}


if __name__ == "__main__":
    torch.save({kind: saved(kind) for kind in KINDS}, sys.argv[1])
