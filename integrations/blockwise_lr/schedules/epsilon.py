"""The size of perturbations in certified training, as a function of steps: smooth from 0, then linear."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ..blocks.types import BlockError, finite, shown

log = logging.getLogger("blockwise_lr")

_SETTINGS = ("epsilon", "warmup_num_steps", "start_num_steps", "middle", "power")


class SmoothedEpsilon:
    """Grows from 0 to ``epsilon``: as a power of the steps at first, then along a line of the slope reached there.

    It is that of auto_LiRPA's SmoothedScheduler, which arXiv 2103.17268 trains with. One call of :meth:`step` per optimizer
    step; the state goes into a checkpoint beside the optimizer's (DeepSpeed's ``client_state``).

    Args:
        epsilon: the last value, above 0.
        warmup_num_steps: optimizer steps in which it grows; 0: it is ``epsilon`` from ``start_num_steps`` on.
        start_num_steps: optimizer steps before, with epsilon 0.
        middle: share of the warmup that follows the power.
        power: of the steps; 1 is a line from the start.

    Attributes:
        steps: optimizer steps done.

    Raises:
        BlockError: a setting out of its range.
    """

    def __init__(
        self,
        epsilon: float,
        warmup_num_steps: int,
        start_num_steps: int = 0,
        *,
        middle: float = 0.25,
        power: float = 4.0,
    ) -> None:
        for name, steps in (("warmup_num_steps", warmup_num_steps), ("start_num_steps", start_num_steps)):
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise BlockError(f"SmoothedEpsilon: {name} is {shown(steps)}; give a whole number of steps, 0 or above")
        for name, value, least, most, wanted in (
            ("epsilon", epsilon, 0.0, math.inf, "a number above 0"),
            ("middle", middle, 0.0, 1.0, "a share above 0, at most 1"),
            ("power", power, 0.0, math.inf, "a number above 0"),
        ):
            number = finite(value)
            if number is None or not least < number <= most:
                raise BlockError(f"SmoothedEpsilon: {name} is {shown(value)}; give {wanted}")
        self.epsilon, self.middle, self.power = float(epsilon), float(middle), float(power)
        self.warmup_num_steps, self.start_num_steps = warmup_num_steps, start_num_steps
        self.steps = 0

    def at(self, steps: int) -> float:
        """Epsilon of the optimizer step behind ``steps`` others."""
        done = steps - self.start_num_steps
        if done >= self.warmup_num_steps:
            return self.epsilon
        if done <= 0:
            return 0.0
        bend = max(int(self.middle * self.warmup_num_steps), 1)
        # the line goes on with the slope of the power, and reaches epsilon
        at_bend = self.epsilon / (1 + (self.warmup_num_steps - bend) * self.power / bend)
        if done <= bend:
            return at_bend * (done / bend) ** self.power
        return at_bend + (self.epsilon - at_bend) * (done - bend) / (self.warmup_num_steps - bend)

    @property
    def value(self) -> float:
        """Epsilon of the next optimizer step."""
        return self.at(self.steps)

    def step(self) -> None:
        """Advances by one optimizer step."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The steps done, and the settings, which :meth:`load_state_dict` compares with its own."""
        return {"steps": self.steps, **{name: getattr(self, name) for name in _SETTINGS}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on at the saved step with this schedule's own settings; logs those that differ from the saved ones.

        Raises:
            BlockError: ``state_dict`` does not say where to go on.
        """
        steps = state_dict.get("steps") if isinstance(state_dict, Mapping) else None
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise BlockError(
                f"SmoothedEpsilon: its saved state is {shown(state_dict)}, without the steps done; give what its state_dict() "
                f"returned"
            )
        self.steps = steps
        for name in _SETTINGS:
            now, saved = getattr(self, name), state_dict.get(name)
            if saved is not None and saved != now:
                log.warning("SmoothedEpsilon goes on with %s = %s; the checkpoint had %s", name, now, saved)
