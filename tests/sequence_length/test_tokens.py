"""Decay by tokens, beside the formula and beside the schedule that counts steps."""

import math

import pytest
import torch

from blockwise_lr import BlockError, BlockwiseAdamW
from blockwise_lr.schedules import BlockwiseTokenCosine, BlockwiseWarmupCosine
from blockwise_lr.sequence_length import SequenceLengthWarmup


def optimizer():
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    named = [(name, torch.nn.Parameter(torch.ones(4, 4) if "norm" not in name else torch.ones(4))) for name in names]
    return BlockwiseAdamW(named, lr=1e-3, min_lr=1e-4)


def test_rates_follow_the_tokens():
    counts = [100, 300, 600, 1000, 1500, 2100, 2800]
    given = iter(counts)
    ours = optimizer()
    schedule = BlockwiseTokenCosine(ours, total_num_tokens=2000, warmup_num_steps=2, tokens=lambda: next(given))
    seen = []
    # torch's base class takes a step when it is built
    for count in [schedule.num_tokens, *counts[1:]]:
        assert schedule.num_tokens == count
        seen.append(ours.block_lrs()[0]["norm"])
        if count != counts[-1]:
            schedule.step()
    parts = [min((count - counts[2]) / (2000 - counts[2]), 1) for count in counts]
    after = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * part)) for part in parts]
    assert seen == pytest.approx([5e-4, 1e-3, *after[2:]], rel=1e-12)
    assert schedule.finished


def test_of_equal_steps_it_is_the_schedule_by_steps_one_step_later():
    first, second = optimizer(), optimizer()
    count = [-50]

    def tokens():
        count[0] += 50
        return count[0]

    ours = BlockwiseTokenCosine(first, 50 * 20, 5, tokens=tokens)
    theirs = BlockwiseWarmupCosine(second, 20, 5)
    rates, expected = [], []
    for _ in range(20):
        rates.append(first.block_lrs()[0])
        expected.append(second.block_lrs()[0])
        ours.step()
        theirs.step()
    assert rates[:5] == expected[:5] and rates[5] == rates[4]
    assert all(mine == pytest.approx(other) for mine, other in zip(rates[6:], expected[5:]))


def test_state_goes_on_and_others_are_refused():
    model = torch.nn.Embedding(8, 4)
    warmup = SequenceLengthWarmup(model, start=8, end=32, steps=4)

    def run(made, schedule, steps):
        found = []
        for _ in range(steps):
            model(torch.zeros(1, 32, dtype=torch.long)).sum().backward()
            warmup.step()
            schedule.step()
            found.append((made.block_lrs()[0], schedule.num_tokens))
        return found

    first = optimizer()
    schedule = BlockwiseTokenCosine(first, 300, 3, tokens=warmup.tokens)
    run(first, schedule, 4)
    saved, kept = schedule.state_dict(), warmup.state_dict()
    straight = run(first, schedule, 5)
    warmup.load_state_dict(kept)
    second = optimizer()
    again = BlockwiseTokenCosine(second, 300, 3, tokens=warmup.tokens)
    again.load_state_dict(saved)
    assert run(second, again, 5) == straight and again.finished == schedule.finished
    with pytest.raises(BlockError, match="holds no count of tokens"):
        again.load_state_dict(BlockwiseWarmupCosine(optimizer(), 9).state_dict())
    with pytest.raises(BlockError, match="total_num_tokens is 0; give a whole number of tokens"):
        BlockwiseTokenCosine(optimizer(), 0)
