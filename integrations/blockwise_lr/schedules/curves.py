"""What a schedule is: the learning rate of a block type as a pure function of how far training is.

A curve knows no optimizer. Its settings are typed and checked as the optimizers' options are; the schedulers
(:mod:`~blockwise_lr.schedules.base`), the flags of Megatron and ``blockwise-lr schedule`` all ask the same curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from ..blocks.presets import PRESETS, lr_ratios
from ..blocks.types import BlockError, block_values, shown
from ..rules.options import CheckedOptions, as_number

AUTO, SAME_SLOPE = "auto", "same_slope"


def _whole(least: int) -> BeforeValidator:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"give a whole number of optimizer steps, {least} or above")
        return value

    return BeforeValidator(check)


def _or_none(check: BeforeValidator) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else check.func(value))  # type: ignore[call-arg]


def _warmup(value: Any) -> Any:
    return value if isinstance(value, str) and value == AUTO else _whole(0).func(value)  # type: ignore[call-arg]


def _factors(value: Any) -> Any:
    if isinstance(value, str):
        if value != SAME_SLOPE:
            raise ValueError(f'write "{SAME_SLOPE}", or factors by block type')
        return value
    return {str(block): factor for block, factor in block_values(value, "block_warmup", positive=False).items()}


def _some_ratios(value: Any) -> dict[str, float]:
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"use one of {', '.join(PRESETS)}, or ratios by block type")
        return {str(block): ratio for block, ratio in lr_ratios(value).items()}
    return {str(block): ratio for block, ratio in block_values(value, "the ratios", positive=True).items()}


def _low(value: Any) -> float | None:
    try:
        number = None if value is None else as_number(value)
    except ValueError:
        number = -1.0
    if number is not None and number < 0:
        raise ValueError("give a min_lr from 0 up to lr")
    return number


Steps = Annotated[int, _whole(0)]
StepsFromOne = Annotated[int, _whole(1)]
StepsOrNone = Annotated[int | None, _or_none(_whole(0))]
SomeRatios = Annotated[dict[str, float], BeforeValidator(_some_ratios)]


@dataclass(frozen=True)
class Levels:
    """What a curve runs between, for one block type.

    Attributes:
        top: its peak, ratio * lr.
        base: lr, the peak of ratio 1.
        low: the shared minimum, at most ``top``.
        warmup: updates (or tokens) of its warmup.
        start: the rate that its warmup begins at.
    """

    top: float
    base: float
    low: float
    warmup: float
    start: float = 0.0

    def warming(self, at: float) -> float:
        """The rate in the warmup, a line from ``start`` at 0 to ``top`` at ``warmup``."""
        return (
            self.top * (at / self.warmup)
            if not self.start
            else self.start + (self.top - self.start) * (at / self.warmup)
        )


class Curve(CheckedOptions):
    """A schedule's settings and formula. All lengths are optimizer steps, or tokens where ``tokens_per_step`` is given.

    Attributes:
        positional: settings that Python callers may give by position.
        floor_share: min_lr is lr over this where nobody says it.
    """

    positional: ClassVar[tuple[str, ...]] = ("total_num_steps", "warmup_num_steps", "min_lr")
    floor_share: ClassVar[float] = 20.0

    warmup_num_steps: Annotated[
        Any,
        BeforeValidator(_warmup),
        Field(
            description='optimizer steps of warmup; 0 starts at the peak; "auto": 2 / (1 - beta2) (arXiv 1910.04209)'
        ),
    ] = 0
    min_lr: Annotated[
        float | None,
        BeforeValidator(_low),
        Field(description="the shared final learning rate; by default the optimizer's min_lr, or lr / 20"),
    ] = None
    block_warmup: Annotated[
        Any,
        BeforeValidator(_factors),
        Field(
            description='factors of block types on warmup_num_steps; "same_slope": the ratio, so that all block types rise '
            "along one line to their peaks (the official code's alpha)"
        ),
    ] = {}
    start_ratios: Annotated[
        SomeRatios,
        Field(description="ratios at the start, or a preset's name; block types not named keep theirs"),
    ] = {}
    start_ratio_num_steps: Annotated[
        Steps, Field(description="optimizer steps in which start_ratios turn into the optimizer's")
    ] = 0
    end_ratios: Annotated[SomeRatios, Field(description="the same for the end")] = {}
    end_ratio_num_steps: Annotated[
        Steps, Field(description="the last optimizer steps, in which the ratios turn into end_ratios")
    ] = 0
    tokens_per_step: Annotated[
        Annotated[int | None, _or_none(_whole(1))],
        Field(
            description="makes all lengths count tokens: an optimizer step has so many, where step(tokens=...) does not say"
        ),
    ] = None

    @model_validator(mode="after")
    def _pairs(self) -> Curve:
        for end in ("start", "end"):
            ratios, steps = getattr(self, f"{end}_ratios"), getattr(self, f"{end}_ratio_num_steps")
            if bool(ratios) != bool(steps):
                raise BlockError(
                    f"{end}_ratios is {shown(ratios)} and {end}_ratio_num_steps is {steps}; give both, or neither"
                )
        if self.end_ratios and self.end is None:
            raise BlockError("end_ratios needs a schedule that ends; this one has no total_num_steps")
        return self

    @property
    def end(self) -> int | None:
        """Where the schedule ends; None for one that goes on."""
        return getattr(self, "total_num_steps", None)

    @property
    def warmup_ends_by(self) -> float | None:
        """What no block type's warmup may go beyond; None: anything."""
        return self.end

    def factor(self, block: str, ratio: float) -> float:
        """A block type's warmup over warmup_num_steps."""
        return ratio if self.block_warmup == SAME_SLOPE else self.block_warmup.get(block, 1.0)

    def ratio(self, block: str, ratio: float, at: float) -> float:
        """A block type's ratio, where it changes over time.

        Args:
            ratio: the optimizer's.
        """
        if block in self.start_ratios and at < self.start_ratio_num_steps:
            ratio = _between(self.start_ratios[block], ratio, at / self.start_ratio_num_steps)
        if block in self.end_ratios and self.end is not None:
            done = (at - (self.end - self.end_ratio_num_steps)) / self.end_ratio_num_steps
            ratio = _between(ratio, self.end_ratios[block], min(max(done, 0.0), 1.0))
        return ratio

    def with_warmup(self, beta2: float | None) -> Curve:
        """This curve, with the number of steps where warmup_num_steps is "auto".

        Args:
            beta2: the decay rate of the optimizer's second moment; None where it has none.

        Raises:
            BlockError: there is no beta2.
        """
        if self.warmup_num_steps != AUTO:
            return self
        if beta2 is None:
            raise BlockError(
                'warmup_num_steps is "auto", which is 2 / (1 - beta2), and the optimizer has no betas; give a number'
            )
        steps = max(round(2 / (1 - beta2)), 1) * (self.tokens_per_step or 1)
        return type(self).checked({**self.given(), "warmup_num_steps": steps})

    def given(self) -> dict[str, Any]:
        """The settings, as plain numbers, strings and dicts."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def refuse_long_warmups(self, ratios: Mapping[str, float]) -> None:
        """Raises BlockError where a block type's warmup is longer than there is time for."""
        most = self.warmup_ends_by
        for block, ratio in ratios.items():
            length = self.warmup_num_steps * self.factor(block, ratio)
            if most is not None and length > most:
                of = f"that of {block} is {length:g}" if block in ratios and length != self.warmup_num_steps else ""
                raise BlockError(
                    f"warmup_num_steps is {self.warmup_num_steps}{', ' + of if of else ''}, and there are {most:g} steps for "
                    f"it; warm up in fewer steps than there are"
                )

    def refuse_low(self, low: float) -> None:
        """Raises BlockError where an exponential decay would have to reach 0."""
        for name in ("decay_style", "anneal_style"):
            if low == 0 and self.end is not None and getattr(self, name, None) == "exponential":
                raise BlockError(
                    f'{name} is "exponential" and min_lr is 0, which it never reaches; give a min_lr above 0'
                )

    def rate(self, at: float, of: Levels) -> float:
        """The learning rate of an update.

        Args:
            at: the number of the update, from 1; in tokens: those seen once the update is done.
            of: what the curve runs between.
        """
        if of.warmup and at <= of.warmup:
            return of.warming(at)
        return self.after(at, of)

    def after(self, at: float, of: Levels) -> float:
        """The rate after the warmup."""
        raise NotImplementedError

    def levels(self, peak: float, low: float, *, block: str | None, ratio: float, at: float, start: float) -> Levels:
        """What the curve runs between at an update, for a block type (None: the base rate)."""
        top = (ratio if block is None else self.ratio(block, ratio, at)) * peak
        factor = 1.0 if block is None else self.factor(block, ratio)
        return Levels(top, peak, min(low, top), self.warmup_num_steps * factor, start)

    def rates(
        self, at: float, peak: float, low: float, ratios: Mapping[str, float], starts: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """The learning rate of every block type at an update.

        Args:
            at: as for :meth:`rate`.
            peak: lr, the peak of ratio 1.
            low: the shared minimum; a block type whose peak is below stays at its peak.
            ratios: block type -> ratio.
            starts: block type -> where its warmup begins; 0 where it is not named.
        """
        starts = starts or {}
        return {
            block: self.rate(at, self.levels(peak, low, block=block, ratio=ratio, at=at, start=starts.get(block, 0.0)))
            for block, ratio in ratios.items()
        }

    def base_rate(self, at: float, peak: float, low: float, start: float = 0.0) -> float:
        """The rate of ratio 1 at an update; what ``group["lr"]`` shows."""
        return self.rate(at, self.levels(peak, low, block=None, ratio=1.0, at=at, start=start))


def _between(first: float, last: float, done: float) -> float:
    return first + (last - first) * done
