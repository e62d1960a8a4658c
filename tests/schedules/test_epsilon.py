"""SmoothedEpsilon against the formula of auto_LiRPA's SmoothedScheduler, its states and its refusals."""

import itertools
import logging

import pytest

from blockwise_lr.blocks import BlockError
from blockwise_lr.schedules import SmoothedEpsilon


def official(step, epsilon, start_epoch, length, steps_per_epoch, mid=0.25, beta=4.0):
    """As its documentation has it: a power up to the bend, then a line."""
    first = (start_epoch - 1) * steps_per_epoch
    last = first + length * steps_per_epoch
    bend = first + int(mid * (last - first))
    t = (bend - first) ** (beta - 1)
    alpha = epsilon / ((last - bend) * beta * t + (bend - first) * t)
    if step < first:
        return 0.0
    if step <= bend:
        return alpha * (step - first) ** beta
    at_bend = alpha * (bend - first) ** beta
    return min(at_bend + (epsilon - at_bend) * (step - bend) / (last - bend), epsilon)


@pytest.mark.parametrize(
    "epsilon, start, length, per_epoch", [(0.4, 1, 20, 234), (8 / 255, 2, 80, 390), (0.1, 3, 1, 7)]
)
def test_every_step_is_the_official_one(epsilon, start, length, per_epoch):
    schedule = SmoothedEpsilon(epsilon, length * per_epoch, (start - 1) * per_epoch)
    for step in range((start + length + 1) * per_epoch):
        assert schedule.value == pytest.approx(official(step, epsilon, start, length, per_epoch), rel=1e-12, abs=1e-15)
        schedule.step()
    assert schedule.value == epsilon


def test_it_rises_without_a_jump_in_its_slope():
    schedule = SmoothedEpsilon(1.0, 4000, 100)
    values = [schedule.at(step) for step in range(4200)]
    slopes = [b - a for a, b in itertools.pairwise(values)]
    assert min(slopes) >= 0 and max(abs(b - a) for a, b in itertools.pairwise(slopes[:4090])) < 2e-6
    assert values[100] == 0 and values[4100] == values[-1] == 1.0


def test_no_warmup_is_the_last_value_at_once():
    assert [SmoothedEpsilon(0.3, 0, 2).at(step) for step in range(4)] == [0.3 if step > 1 else 0.0 for step in range(4)]


def test_a_state_goes_on_in_mid_ramp_and_says_what_differs(caplog):
    first = SmoothedEpsilon(0.4, 100, 10)
    for _ in range(47):
        first.step()
    second = SmoothedEpsilon(0.4, 100, 10)
    second.load_state_dict(first.state_dict())
    assert second.value == first.value == first.at(47) and not caplog.records
    with caplog.at_level(logging.WARNING, "blockwise_lr"):
        longer = SmoothedEpsilon(0.4, 200, 10)
        longer.load_state_dict(first.state_dict())
    assert "warmup_num_steps = 200; the checkpoint had 100" in caplog.text and longer.steps == 47


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"epsilon": 0, "warmup_num_steps": 5}, "epsilon is 0"),
        ({"epsilon": "0.4", "warmup_num_steps": 5}, "epsilon is '0.4'"),
        ({"epsilon": 0.4, "warmup_num_steps": 5.0}, "warmup_num_steps is 5.0"),
        ({"epsilon": 0.4, "warmup_num_steps": 5, "start_num_steps": -1}, "start_num_steps is -1"),
        ({"epsilon": 0.4, "warmup_num_steps": 5, "middle": 1.5}, "middle is 1.5"),
        ({"epsilon": 0.4, "warmup_num_steps": 5, "power": float("nan")}, "power is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(BlockError, match=said):
        SmoothedEpsilon(**settings)


@pytest.mark.parametrize("state", [None, {}, {"steps": -1}, {"steps": True}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(BlockError, match="without the steps done"):
        SmoothedEpsilon(0.4, 5).load_state_dict(state)
