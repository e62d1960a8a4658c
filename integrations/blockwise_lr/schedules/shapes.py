"""The curves: warmup and what follows it. ``t`` is the number of the update, from 1; W the warmup, N the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from ..blocks.types import BlockError, block_values, shown
from ..rules.options import as_number, one_of
from .curves import Curve, Levels, Steps, StepsFromOne, StepsOrNone

# share of the way from the top to the bottom that is still to go, at a share x of the time
_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}
EXPONENTIAL = "exponential"
Decay = Annotated[str, one_of(*_LEFT, EXPONENTIAL)]
DECAY_STYLES = (*_LEFT, EXPONENTIAL)


def decayed(style: str, top: float, low: float, x: float) -> float:
    """From ``top`` at x = 0 to ``low`` at x = 1; both hold beyond.

    linear: top + (low - top) x; cosine: low + (top - low) (1 + cos(pi x)) / 2; minus_sqrt: low + (top - low) (1 - sqrt(x));
    exponential: top (low / top)^x.
    """
    x = min(max(x, 0.0), 1.0)
    if style == EXPONENTIAL:
        return top * (low / top) ** x if top else 0.0
    left = _LEFT[style](x)
    return left * top + (1.0 - left) * low


class _Ending(Curve):
    """A curve that reaches min_lr."""

    total_num_steps: Annotated[StepsFromOne, Field(description="optimizer steps until min_lr is reached")]


class WarmupCosine(_Ending):
    """Linear warmup, then a cosine: low + (top - low) (1 + cos(pi (t - W) / (N - W))) / 2 (arXiv 2502.19002)."""

    def after(self, at: float, of: Levels) -> float:
        return decayed("cosine", of.top, of.low, (at - of.warmup) / max(self.total_num_steps - of.warmup, 1))


class WarmupLinear(_Ending):
    """Linear warmup, then a line: top + (low - top) (t - W) / (N - W)."""

    def after(self, at: float, of: Levels) -> float:
        return decayed("linear", of.top, of.low, (at - of.warmup) / max(self.total_num_steps - of.warmup, 1))


class WarmupConstant(Curve):
    """Linear warmup, then the peak."""

    positional = ("warmup_num_steps",)

    def after(self, at: float, of: Levels) -> float:
        return of.top


class WarmupInverseSqrt(Curve):
    """Linear warmup, then max(low, top sqrt(S / (t - W + S))), where S is timescale_num_steps and W by default.

    With that default it is top sqrt(W / t), the schedule of arXiv 1706.03762 (there without a minimum).
    """

    positional = ("warmup_num_steps", "timescale_num_steps", "min_lr")

    timescale_num_steps: Annotated[
        StepsOrNone, Field(description="in how many steps after the warmup the rate falls by 1 / sqrt(2); the warmup")
    ] = None

    def after(self, at: float, of: Levels) -> float:
        scale = max(of.warmup if self.timescale_num_steps is None else self.timescale_num_steps, 1)
        return max(of.low, of.top * math.sqrt(scale / (at - of.warmup + scale)))


def _meeting(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == "lr"):
        return value
    number = as_number(value)
    if number < 0:
        raise ValueError('give a learning rate, or "lr"')
    return number


class WSD(_Ending):
    """Warmup, stable, decay: linear warmup, the peak, and in the last steps a decay to min_lr (lr / 10 by default).

    With ``meet_lr`` it is the official code's blockwise form (arXiv 2502.19002): block types stay at their own peaks to a
    third of the steps, go from there linearly to one rate, which they reach where the decay begins, and decay together.
    """

    floor_share: ClassVar[float] = 10.0

    decay_num_steps: Annotated[
        StepsOrNone, Field(description="the last optimizer steps, in which the rate decays; a third by default")
    ] = None
    decay_style: Annotated[Decay, Field(description="linear, cosine, minus_sqrt or exponential")] = "linear"
    meet_lr: Annotated[
        Any, BeforeValidator(_meeting), Field(description='the rate at which block types meet; "lr": the base rate')
    ] = None
    meet_begin_num_steps: Annotated[
        StepsOrNone, Field(description="where they leave their peaks; a third of the steps by default")
    ] = None

    @property
    def decay_begins(self) -> int:
        """The last update at the peak, or where block types meet."""
        if self.decay_num_steps is None:
            return int(self.total_num_steps * 2 / 3)
        return self.total_num_steps - self.decay_num_steps

    @property
    def meeting_begins(self) -> int:
        """The last update at the peaks before block types go to meet."""
        return int(self.total_num_steps / 3) if self.meet_begin_num_steps is None else self.meet_begin_num_steps

    @property
    def warmup_ends_by(self) -> float:
        return self.decay_begins if self.meet_lr is None else self.meeting_begins

    @model_validator(mode="after")
    def _phases(self) -> WSD:
        if self.decay_begins < 0:
            raise BlockError(
                f"decay_num_steps is {self.decay_num_steps} and total_num_steps is {self.total_num_steps}; decay in fewer "
                f"steps than there are"
            )
        if self.meet_lr is not None and self.meeting_begins > self.decay_begins:
            raise BlockError(
                f"meet_begin_num_steps is {self.meeting_begins} and the decay begins at {self.decay_begins}; begin earlier"
            )
        return self

    def after(self, at: float, of: Levels) -> float:
        begins, top = self.decay_begins, of.top
        if self.meet_lr is not None:
            meet = of.base if self.meet_lr == "lr" else self.meet_lr
            on_the_way = (at - self.meeting_begins) / max(begins - self.meeting_begins, 1)
            top = decayed("linear", top, meet, on_the_way)
        return decayed(self.decay_style, top, min(of.low, top), (at - begins) / max(self.total_num_steps - begins, 1))


def _above_0(most: float = math.inf) -> BeforeValidator:
    def check(value: Any) -> float:
        number = as_number(value)
        if not 0 < number <= most:
            raise ValueError(f"give a number above 0{f', up to {most:g}' if most < math.inf else ''}")
        return number

    return BeforeValidator(check)


CHECKPOINT = "checkpoint"


def _start(value: Any) -> Any:
    if isinstance(value, str) and value == CHECKPOINT:
        return value
    if isinstance(value, Mapping):
        return {str(block): rate for block, rate in block_values(value, "start_lr", positive=False).items()}
    number = as_number(value)
    if number < 0:
        raise ValueError('give a learning rate, one by block type, or "checkpoint"')
    return number


class Rewarm(_Ending):
    """For training on with new data: from the rates that a checkpoint ended at to the peak again, and down (arXiv
    2308.04014, 2403.08763).

    All counts of steps are relative to ``begin_num_steps``. The sources warm up in 0 to 2% of the new steps and find that
    the length hardly matters.
    """

    positional = ("total_num_steps", "warmup_num_steps", "min_lr", "begin_num_steps")

    begin_num_steps: Annotated[
        Steps,
        Field(description="optimizer steps (tokens) that the checkpoint has done; the scheduler's count goes on there"),
    ] = 0
    start_lr: Annotated[
        Any,
        BeforeValidator(_start),
        Field(
            description='where the warmup begins: "checkpoint", the rates of the loaded run; a rate, as the old min_lr; rates '
            "by block type; or 0, as GPT-NeoX does"
        ),
    ] = CHECKPOINT
    decay_style: Annotated[Decay, Field(description="linear, cosine, minus_sqrt or exponential")] = "cosine"

    def rate(self, at: float, of: Levels) -> float:
        return super().rate(max(at - self.begin_num_steps, 0), of)

    def ratio(self, block: str, ratio: float, at: float) -> float:
        return super().ratio(block, ratio, max(at - self.begin_num_steps, 0))

    def after(self, at: float, of: Levels) -> float:
        return decayed(self.decay_style, of.top, of.low, (at - of.warmup) / max(self.total_num_steps - of.warmup, 1))

    def starts(self, blocks: list[str]) -> dict[str, float] | None:
        """Where the warmup of each block type begins, as far as the settings say; None: at a checkpoint's rates."""
        if self.start_lr == CHECKPOINT:
            return None
        if isinstance(self.start_lr, Mapping):
            return {block: self.start_lr.get(block, 0.0) for block in blocks}
        return dict.fromkeys(blocks, self.start_lr)


class Infinite(Curve):
    """Warmup, cooldown, constant for any time, and an anneal on demand (arXiv 2403.08763, 2503.02844).

    With x the share of the cooldown that is done, C = constant_factor top: cosine or linear from top to C, or "inverse_sqrt",
    top + (C - top) h(x) / h(1), h(x) = 1 / sqrt(1 + timescale x) - 1. The anneal goes exponentially from the rate at its
    begin, r, to min_lr: r (low / r)^x. Who trains on goes back to the checkpoint from before the anneal.
    """

    positional = ()

    cooldown_num_steps: Annotated[Steps, Field(description="optimizer steps from the peak to the constant rate")]
    constant_factor: Annotated[
        float, _above_0(1.0), Field(description="the constant rate over the peak, for every block type; up to 1")
    ]
    cooldown_style: Annotated[
        str, one_of("cosine", "inverse_sqrt", "linear"), Field(description="cosine, inverse_sqrt or linear")
    ] = "cosine"
    timescale: Annotated[float, _above_0(), Field(description="of inverse_sqrt")] = 10.0
    anneal_begin_num_steps: Annotated[
        StepsOrNone, Field(description="the last optimizer step before the anneal; none by default")
    ] = None
    anneal_num_steps: Annotated[Steps, Field(description="optimizer steps of the anneal")] = 0
    anneal_style: Annotated[Decay, Field(description="exponential, linear, cosine or minus_sqrt")] = EXPONENTIAL

    @model_validator(mode="after")
    def _both(self) -> Infinite:
        if (self.anneal_begin_num_steps is None) != (self.anneal_num_steps == 0):
            raise BlockError(
                f"anneal_begin_num_steps is {shown(self.anneal_begin_num_steps)} and anneal_num_steps is "
                f"{self.anneal_num_steps}; give both, or neither"
            )
        return self

    @property
    def end(self) -> int | None:
        return None if self.anneal_begin_num_steps is None else self.anneal_begin_num_steps + self.anneal_num_steps

    @property
    def warmup_ends_by(self) -> float | None:
        return None

    def rate(self, at: float, of: Levels) -> float:
        begin = self.anneal_begin_num_steps
        if begin is None or at <= begin:
            return super().rate(at, of)
        top = super().rate(begin, of)
        return decayed(self.anneal_style, top, min(of.low, top), (at - begin) / self.anneal_num_steps)

    def after(self, at: float, of: Levels) -> float:
        constant = self.constant_factor * of.top
        x = min((at - of.warmup) / self.cooldown_num_steps, 1.0) if self.cooldown_num_steps else 1.0
        if self.cooldown_style != "inverse_sqrt":
            return decayed(self.cooldown_style, of.top, constant, x)
        return of.top + (constant - of.top) * self._fallen(x) / self._fallen(1.0)

    def _fallen(self, x: float) -> float:
        return 1 / math.sqrt(1 + self.timescale * x) - 1
