"""Optimizers whose states are all of the parameter's shape."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks import ParamLayout
from ..plan.shards import Fragment
from ..plan.step_plan import StepPlan, element_plan
from .base import BlockwiseOptimizer, Due


class ElementwiseOptimizer(BlockwiseOptimizer):
    """Base of the optimizers of rules without segments."""

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        return element_plan(numel, fragments, layouts)

    def _step(self, due: Sequence[Due]) -> None:
        self._step_rows(due)
