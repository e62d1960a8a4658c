"""Blockwise schedules that Megatron has no flags for, on Megatron's own OptimizerParamScheduler.

Megatron counts samples; a curve counts optimizer steps (iterations of a whole batch), as under the other doors: the first
update has the rate of step 1, not of 0. Everything else of Megatron's scheduler, its saved state and its weight decay stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..blocks import BlockError
from ..blocks.types import did_you_mean, shown
from ..optim.base import BlockwiseOptimizer
from ..schedules import SCHEDULES, Curve
from ..schedules.shapes import Rewarm

_SAMPLES = "samples_per_step"


@dataclass(frozen=True)
class BlockSchedule:
    """A curve, and how many samples an optimizer step has.

    Attributes:
        curve: its settings and formula; min_lr is Megatron's.
        samples_per_step: the global batch; None: Megatron's, or 1 where its arguments are not in use.
    """

    curve: Curve
    samples_per_step: int | None = None

    @classmethod
    def checked(cls, given: Mapping[str, Any] | None) -> BlockSchedule | None:
        """From ``{"type": "BlockwiseWSD", ...}``, the scheduler type of a ds_config and its parameters.

        Raises:
            BlockError: an unknown type or parameter, or a bad value.
        """
        if given is None:
            return None
        values = dict(given) if isinstance(given, Mapping) else {}
        name, samples = values.pop("type", None), values.pop(_SAMPLES, None)
        if name not in SCHEDULES:
            raise BlockError(
                f"the block schedule's type is {shown(name)}{did_you_mean(name, SCHEDULES)}; use one of {', '.join(SCHEDULES)}"
            )
        curve_type = SCHEDULES[name].curve_type
        missing = [key for key, field in curve_type.model_fields.items() if field.is_required() and key not in values]
        if missing:
            raise BlockError(f"block schedule {name}: {missing[0]} is missing; the valid ones are {_names(curve_type)}")
        if "min_lr" in values:
            raise BlockError(f"block schedule {name}: min_lr is Megatron's own --min-lr; leave it out")
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise BlockError(f"block schedule {name}: {_SAMPLES} is {shown(samples)}; give the global batch size")
        curve = curve_type.checked(values, f"block schedule {name}: ")
        if isinstance(curve, Rewarm) and curve.starts([]) is None:
            raise BlockError(
                f"block schedule {name}: start_lr must be a rate under Megatron, whose scheduler saves none; give the min_lr "
                f"that the checkpoint's run ended at, or 0"
            )
        return cls(curve, samples)

    def fitted(self, optimizer: BlockwiseOptimizer, arguments: Any) -> BlockSchedule:
        """For an optimizer: with its beta2 where the warmup is "auto", and Megatron's global batch.

        Raises:
            BlockError: a warmup that is too long for a block type's.
        """
        betas = optimizer.defaults.get("betas")
        curve = self.curve.with_warmup(float(betas[1]) if betas else None)
        for group in optimizer.param_groups:
            curve.refuse_long_warmups(group["block_lr_ratios"])
        samples = self.samples_per_step or getattr(arguments, "global_batch_size", None) or 1
        return BlockSchedule(curve, int(samples))

    def rates(
        self, samples: int, peak: float, low: float, ratios: Mapping[str, float]
    ) -> tuple[float, dict[str, float]]:
        """The base rate and every block type's for the next update, after so many samples."""
        at = samples / (self.samples_per_step or 1) + 1
        if self.curve.tokens_per_step is not None:
            at *= self.curve.tokens_per_step
        self.curve.refuse_low(low)
        starts = self.curve.starts(["", *ratios]) if isinstance(self.curve, Rewarm) else None
        starts = starts or {}
        return (
            self.curve.base_rate(at, peak, low, starts.get("", 0.0)),
            self.curve.rates(at, peak, low, ratios, starts),
        )


def _names(curve: type[Curve]) -> str:
    return ", ".join(name for name in curve.model_fields if name != "min_lr")


def schedule_in(optimizer: Any) -> BlockSchedule | None:
    """The block schedule of a Megatron optimizer; None where it follows Megatron's own."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, BlockwiseOptimizer) and inner.block_schedule is not None:
            return inner.block_schedule
    return None
