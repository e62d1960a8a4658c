"""The real Trainer and Accelerate on two ranks: with DeepSpeed, and without; stopped and resumed."""

import pytest
import torch
from hugging_face import runs
from ranks import pool
from twins import RATIOS, paper_lr


@pytest.mark.parametrize(
    "deepspeed, kind",
    [
        (runs.ds_config("BlockwiseAdamW", 2), "BlockwiseAdamW"),
        (runs.ds_config("BlockwiseAdamMini", 3), "BlockwiseAdamMini"),
        (None, "BlockwiseAdamW"),
        (None, "BlockwiseAdamMini"),
        (None, "BlockwiseLion"),
    ],
    ids=["ZeRO-2 AdamW", "ZeRO-3 Adam-mini", "DDP AdamW", "DDP Adam-mini", "DDP Lion"],
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, deepspeed, kind):
    whole = pool(2).run(runs.train, str(tmp_path), deepspeed, kind)[0]
    resumed = pool(2).run(runs.train, str(tmp_path), deepspeed, kind, True)[0]
    assert whole["optimizer"] == resumed["optimizer"] == kind
    assert sorted(whole["losses"]) == list(range(1, runs.STEPS + 1))
    later = {step: loss for step, loss in whole["losses"].items() if step > runs.SAVE_AT}
    assert {step: loss for step, loss in resumed["losses"].items() if step > runs.SAVE_AT} == later
    assert resumed["lrs"] == whole["lrs"]


@pytest.mark.parametrize("deepspeed", [runs.ds_config("BlockwiseAdamW", 2), None], ids=["ZeRO-2", "DDP"])
def test_training_with_the_sharpness_callback_is_training_without(tmp_path, deepspeed):
    kind = "BlockwiseAdamW"
    plain = pool(2).run(runs.train, str(tmp_path), deepspeed, kind)
    watched = pool(2).run(runs.train, str(tmp_path), deepspeed, kind, False, "llama", 2)
    assert watched[0]["losses"] == plain[0]["losses"] and len(plain[0]["losses"]) == runs.STEPS
    assert all(torch.equal(a, b) for a, b in zip(watched[0]["weights"], plain[0]["weights"], strict=True))
    (found, other), steps = (one["sharpness"] for one in watched), [2, 4, 6]
    assert not plain[0]["sharpness"] and list(found) == list(other) == steps
    for step in steps:
        figures = {name: value for name, value in found[step].items() if name.startswith("sharpness")}
        assert len(figures) == 12 and all(0 < value < float("inf") for value in figures.values())
        assert figures.items() <= other[step].items()  # the same on both ranks


@pytest.mark.parametrize("stage", [1, 3])
def test_accelerate_saves_and_resumes(tmp_path, stage):
    whole = pool(2).run(runs.accelerate, str(tmp_path), stage)[0]
    resumed = pool(2).run(runs.accelerate, str(tmp_path), stage, True)[0]
    assert whole["optimizer"] == "BlockwiseAdamW" and len(whole["losses"]) == runs.STEPS
    assert resumed["losses"] == {step: loss for step, loss in whole["losses"].items() if step > runs.SAVE_AT}
    assert resumed["lrs"] == whole["lrs"]


def test_accelerate_steps_the_schedule_once_an_optimizer_step_and_saves_it(tmp_path):
    seen = pool(1).run(runs.accelerate_alone, str(tmp_path))[0]
    wanted = [
        {
            block: paper_lr(step, ratio, runs.OPTIMIZER["lr"], runs.OPTIMIZER["lr"] / 20, 2, runs.STEPS)
            for block, ratio in RATIOS.items()
        }
        for step in range(1, runs.STEPS + 1)
    ]
    assert seen["run"] == [pytest.approx(rates) for rates in wanted]
    assert seen["resumed"][: runs.STEPS - runs.SAVE_AT] == [pytest.approx(rates) for rates in wanted[runs.SAVE_AT :]]
