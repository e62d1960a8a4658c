"""Optimizers whose states are all of the parameter's shape."""

from __future__ import annotations

import torch

from ..blocks import ParamLayout
from ..kernels import StepValues
from ..plan.shards import Fragment
from ..plan.step_plan import StepPlan, element_plan
from .base import BlockwiseOptimizer


class ElementwiseOptimizer(BlockwiseOptimizer):
    """Base of the optimizers of rules without segments."""

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        return element_plan(numel, fragments, layouts)

    def _step(self, work: list[tuple[torch.Tensor, StepValues]]) -> None:
        for p, values in work:
            with self._rows(p) as (param, grad, states):
                self._kernel(p).element_step(self.rule, param, grad, states, self.plan_of(p), values, self.copy_of(p))
