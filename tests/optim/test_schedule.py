"""The paper's schedule on a plain optimizer."""
import pytest
import torch

from blockwise_lr import BlockError, BlockwiseAdamW, map_blocks
from blockwise_lr.schedules import BlockwiseWarmupCosine
from twins import RATIOS, make, paper_lr


def optimizer(**settings):
    model = make("llama")
    return BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(model), **settings)


def test_all_blocks_meet_at_min_lr_and_a_resumed_schedule_goes_on():
    ours = optimizer()
    schedule = BlockwiseWarmupCosine(ours, total_num_steps=20, warmup_num_steps=5)
    for step in range(1, 24):
        wanted = {b: paper_lr(min(step, 20), r, 1e-3, 1e-3 / 20, 5, 20) for b, r in RATIOS.items()}
        assert ours.block_lrs()[0] == pytest.approx(wanted, rel=1e-12)
        saved = schedule.state_dict()
        schedule = BlockwiseWarmupCosine(optimizer(), total_num_steps=20, warmup_num_steps=5)
        ours = schedule.optimizer
        schedule.load_state_dict(saved)
        schedule.step()


def test_torch_schedulers_keep_the_ratios():
    ours = optimizer()
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.25)
    assert ours.block_lrs()[0] == pytest.approx({b: r * 0.25e-3 for b, r in RATIOS.items()})


def test_any_optimizer_can_have_it():
    weight = torch.nn.Parameter(torch.zeros(2))
    plain = torch.optim.AdamW([{"params": [weight], "lr": 0.1}], lr=1.0)
    schedule = BlockwiseWarmupCosine(plain, total_num_steps=10, warmup_num_steps=2, min_lr=0.01)
    seen = []
    for _ in range(10):
        seen.append(plain.param_groups[0]["lr"])
        schedule.step()
    assert seen == pytest.approx([paper_lr(step, 1.0, 0.1, 0.01, 2, 10) for step in range(1, 11)])


@pytest.mark.parametrize("arguments, words", [
    ({"total_num_steps": 0}, "warm up in fewer steps"),
    ({"total_num_steps": 5, "warmup_num_steps": 6}, "warm up in fewer steps"),
    ({"total_num_steps": 5.5}, "whole number"),
    ({"total_num_steps": 5, "min_lr": -1.0}, "from 0 up to lr"),
])
def test_bad_counts(arguments, words):
    with pytest.raises(BlockError, match=words):
        BlockwiseWarmupCosine(optimizer(), **arguments)
