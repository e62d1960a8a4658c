"""--guard through Megatron's real pretrain(): rates lowered, saved and ended, and gone back by a new start."""

import json
import re

import pytest
from megatron_door.test_pretrain import data, launch, losses  # noqa: F401  the fixture of a small corpus

# at which losses jump
OURS = ["--optimizer", "blockwise_adamw", "--block-lr-ratios", "paper", "--log-interval", "1", "--lr", "3e-2"]
EAGER = ["--guard-loss-ratio", "1.0001", "--guard-after", "3"]


def saving(folder, *flags):
    return [
        *OURS,
        "--save",
        str(folder),
        "--load",
        str(folder),
        "--save-interval",
        "2",
        "--ckpt-format",
        "torch",
        *flags,
    ]


def rises(log, ratio=1.0001, after=3):
    """The first iteration behind some whose loss is so many times the lowest before it."""
    found = losses(log)
    return next(
        number for number in range(after + 1, len(found) + 1) if found[number - 1] > ratio * min(found[: number - 1])
    )


@pytest.fixture(scope="module")
def plain(data):  # noqa: F811
    code, log = launch(data, *OURS)
    assert code == 0, log[-3000:]
    return log


def rate(log, iteration, block):
    line = re.search(rf"iteration {iteration} learning rates \|.*?{block}: (\S+)", log)
    return float(line[1])


def test_rates_are_lowered_and_a_resumed_run_knows(data, plain, tmp_path):  # noqa: F811
    at = rises(plain)
    flags = saving(tmp_path, "--guard", "lower", *EAGER, "--guard-steps", "30", "--guard-factor", "0.5")
    code, log = launch(data, *flags, "--exit-interval", "10")
    assert code == 0, log[-3000:]
    assert losses(log)[: at + 1] == losses(plain)[: at + 1] and losses(log)[at + 1] != losses(plain)[at + 1]
    assert f"guard: step {at}: the loss" in log and "rates times 0.5 for 30 steps" in log
    assert rate(log, at + 2, "qk") == pytest.approx(rate(plain, at + 2, "qk") / 2)
    code, log = launch(data, *flags)
    assert code == 0 and len(losses(log)) == 10, log[-3000:]
    assert "guard: step" not in log  # it waits still
    assert rate(log, 15, "qk") == pytest.approx(rate(plain, 15, "qk") / 2)


def test_it_saves_and_ends(data, plain, tmp_path):  # noqa: F811
    at = rises(plain)
    code, log = launch(data, *saving(tmp_path), "--guard", "stop", *EAGER)
    assert code == 0, log[-3000:]
    assert f"guard: step {at}: the loss" in log and "the run stops, the state is saved" in log
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(at) and len(losses(log)) == at


def test_it_goes_back_by_a_new_start(data, plain, tmp_path):  # noqa: F811
    """And that skips the iterations which were thrown away; when that has not helped often enough, the run ends."""
    at = rises(plain, 1.2)
    newest = (at - 1) // 2 * 2
    flags = saving(tmp_path, "--guard", "roll_back", "--guard-after", "3", "--guard-loss-ratio")
    code, log = launch(data, *flags, "1.2")
    assert code == 1 and f"skips the data of iterations {newest + 1} to {at}" in log, log[-3000:]
    (alarm,) = json.loads((tmp_path / "blockwise_lr_guard.json").read_text())
    assert (alarm["step"], alarm["back_to"]) == (at, newest)
    code, log = launch(data, *flags, "100", "--exit-interval", str(at + 2))
    assert code == 0 and f"guard: the data of iterations {newest + 1} to {at} is skipped" in log, log[-3000:]
    assert [int(number) for number in re.findall(r"iteration +(\d+)/", log)] == [at + 1, at + 2]
    again = [{**alarm, "back_to": at + 2}] * 3
    (tmp_path / "blockwise_lr_guard.json").write_text(json.dumps(again))
    code, log = launch(data, *flags, "1.0001")
    assert code == 1 and f"4 times after the checkpoint of iteration {at + 2}, which was gone back to" in log, log[
        -3000:
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--guard-steps", "3"], "--guard-steps has no effect without --guard"),
        (["--guard", "lower", "--guard-variance-ratio", "2"], "give that flag too"),
        (["--guard", "lower", "--guard-factor", "2"], "--guard: factor is 2.0"),
        (["--guard", "roll_back"], "give --save and --load with one folder"),
    ],
)
def test_bad_flags(data, flags, words):  # noqa: F811
    code, log = launch(data, *OURS, *flags)
    assert code == 1 and words in log, log[-2000:]
    assert not losses(log)


def test_another_optimizer_is_told(data):  # noqa: F811
    code, log = launch(data, "--guard", "lower")
    assert code == 1 and "--guard lower needs a blockwise optimizer" in log, log[-2000:]
