"""The paper's schedule on a plain optimizer."""

import pytest
import torch
from twins import RATIOS, make, paper_lr

from blockwise_lr import BlockError, BlockwiseAdamW, map_blocks
from blockwise_lr.schedules import BlockwiseWarmupCosine


def optimizer(**settings):
    model = make("llama")
    settings = {"block_lr_ratios": "paper", **settings}
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"total_num_steps": 0}, "1 or above"),
        ({"total_num_steps": 5, "warmup_num_steps": 6}, "warm up in fewer steps"),
        ({"total_num_steps": 5.5}, "whole number"),
        ({"total_num_steps": 5, "min_lr": -1.0}, "from 0 up to lr"),
    ],
)
def test_bad_counts(arguments, words):
    with pytest.raises(BlockError, match=words):
        BlockwiseWarmupCosine(optimizer(), **arguments)


# ---- rates cannot be made of numbers that do not belong together


def step_down(ours, schedule, steps):
    for _ in range(steps):
        ours.step()
        schedule.step()


def test_a_rate_of_0_is_0_whatever_the_schedule_said_before():
    ours = optimizer()
    step_down(ours, BlockwiseWarmupCosine(ours, 10, 2), 8)
    kept = ours.block_lrs()[0], ours.param_groups[0]["lr"]
    ours.param_groups[0]["lr"] = 0.0
    assert set(ours.block_lrs()[0].values()) == {0.0}
    ours.param_groups[0]["lr"] = kept[1]  # as torch's get_optimizer_state_dict does
    assert ours.block_lrs()[0] == kept[0]


@pytest.mark.parametrize(
    "scheduler, arguments",
    [
        ("LinearLR", {}),
        ("CosineAnnealingLR", {"T_max": 5}),
        ("ExponentialLR", {"gamma": 0.5}),
        ("StepLR", {"step_size": 1}),
        ("ConstantLR", {}),
        ("LambdaLR", {"lr_lambda": lambda step: 1 / (1 + step)}),
        ("OneCycleLR", {"max_lr": 1e-3, "total_steps": 20}),
        ("CyclicLR", {"base_lr": 1e-5, "max_lr": 1e-3, "cycle_momentum": False}),
        ("PolynomialLR", {}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3}),
    ],
)
def test_another_scheduler_after_ours_sets_ratios_times_its_rate(scheduler, arguments):
    ours = optimizer()
    step_down(ours, BlockwiseWarmupCosine(ours, 10, 2), 9)
    fresh = optimizer()
    fresh.load_state_dict(ours.state_dict())
    other = getattr(torch.optim.lr_scheduler, scheduler)(fresh, **arguments)
    for _ in range(4):
        lr = fresh.param_groups[0]["lr"]
        assert lr > 0 and fresh.block_lrs()[0] == pytest.approx({b: r * lr for b, r in RATIOS.items()})
        fresh.step()
        other.step()
    assert fresh.param_groups[0]["block_min_lr"] is None


def test_a_rate_below_0_is_refused_before_the_step():
    ours = optimizer()
    before = [p.detach().clone() for p in ours.all_tensors()]
    for p in ours.all_tensors():
        p.grad = torch.ones_like(p)
    for wrong in (-1e-4, float("nan")):
        ours.param_groups[0]["lr"] = wrong
        with pytest.raises(BlockError, match="lr is .*0 or above"):
            ours.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.all_tensors(), before))


@pytest.mark.parametrize("first", ["optimizer", "scheduler"])
@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_schedule_states_its_rates_in_either_order_of_loading(first, older):
    ours = optimizer()
    schedule = BlockwiseWarmupCosine(ours, 20, 4)
    step_down(ours, schedule, 12)
    saved, position, wanted = ours.state_dict(), schedule.state_dict(), ours.block_lrs()
    if older:  # what version 0.1 saved
        saved["param_groups"][0].update(lr_floor=2e-5, min_lr=5e-5, block_lrs=None)
    fresh = optimizer()
    again = BlockwiseWarmupCosine(fresh, 20, 4)
    if first == "optimizer":
        fresh.load_state_dict(saved)
        again.load_state_dict(position)
    else:
        again.load_state_dict(position)
        fresh.load_state_dict(saved)
    assert fresh.block_lrs() == wanted


def test_no_rate_rises_while_the_others_decay():
    ours = optimizer(block_lr_ratios={"norm": 0.01})
    schedule = BlockwiseWarmupCosine(ours, 20, 4)
    seen = []
    for _ in range(22):
        seen.append(ours.block_lrs()[0]["norm"])
        step_down(ours, schedule, 1)
    assert seen[4:] == pytest.approx([1e-5] * len(seen[4:])) and max(seen) == pytest.approx(1e-5)


def test_the_peak_is_the_rate_the_optimizer_was_built_with():
    for scheduled in (True, False):
        ours = optimizer()
        if scheduled:
            step_down(ours, BlockwiseWarmupCosine(ours, 10, 2), 9)
        else:
            ours.param_groups[0]["lr"] = 1e-5
        fresh = optimizer()
        fresh.load_state_dict(ours.state_dict())
        schedule = BlockwiseWarmupCosine(fresh, 10, 2, last_batch_iteration=2)
        assert schedule.peaks == [1e-3]
        assert fresh.param_groups[0]["lr"] == pytest.approx(paper_lr(4, 1.0, 1e-3, 5e-5, 2, 10))


def test_it_is_a_torch_scheduler():
    ours = optimizer()
    schedule = BlockwiseWarmupCosine(ours, 10, 2)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule.get_last_lr() == [ours.param_groups[0]["lr"]]
    first = torch.optim.lr_scheduler.ConstantLR(ours, factor=0.5)
    chain = torch.optim.lr_scheduler.SequentialLR(ours, [first, schedule], milestones=[3])
    seen = []
    for _ in range(8):
        seen.append(ours.block_lrs()[0]["qk"])
        step_down(ours, chain, 1)
    assert seen[:3] == pytest.approx([4e-3] * 3)
    assert seen[3:] == pytest.approx([paper_lr(step, 8.0, 1e-3, 5e-5, 2, 10) for step in range(1, 6)])


@pytest.mark.parametrize("value", [-5, 1.5, True, "0"])
def test_bad_iterations(value):
    with pytest.raises(BlockError, match="last_batch_iteration is"):
        BlockwiseWarmupCosine(optimizer(), 10, 2, last_batch_iteration=value)


def test_an_optimizer_describes_itself_in_one_line():
    model = make("llama")
    named = list(model.named_parameters())
    groups = [{"params": named[:4]}, {"params": named[4:], "lr": 2e-3}]
    optimizer = BlockwiseAdamW(groups, lr=1e-3, block_map=map_blocks(model), kernel="reference")
    BlockwiseWarmupCosine(optimizer, 100, 10)  # peaks are told, not the first step of the warmup
    told = optimizer.describe()
    assert told.startswith("BlockwiseAdamW (reference kernel, ") and "\n" not in told
    assert "norm 160 at 0.001 and 0.002" in told and f"embedding {61 * 32:,} at 0.01 and 0.02" in told
