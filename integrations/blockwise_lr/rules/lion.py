"""Lion (arXiv 2302.06675) with one learning rate per block type: the second set of runs in Blockwise LR (2502.19002)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from .base import CppBody, State, UpdateRule, tl
from .options import Betas, NotNegative, OptimizerOptions, Rate


class LionOptions(OptimizerOptions):
    """Those of Lion."""

    FOLLOWS_ADAMW = False

    lr: Annotated[
        Rate, Field(description="the base learning rate, that of block types of ratio 1; 3 to 10 times below AdamW's")
    ] = 1e-4
    betas: Annotated[
        Betas, Field(description="weight of the momentum in the update's direction, and its decay rate")
    ] = (0.95, 0.98)
    weight_decay: Annotated[
        NotNegative, Field(description="decoupled, 3 to 10 times AdamW's; not applied to norms and biases by default")
    ] = 1.0


class Lion(UpdateRule):
    r"""Lion (arXiv 2302.06675) with one learning rate per block type.

    Every element moves by its learning rate, in the direction of an average of momentum and gradient::

        p <- p (1 - lr wd)
        p <- p - lr sign(b1 m + (1 - b1) g)
        m <- b2 m + (1 - b2) g

    The sign of 0 is 0: padding and tokens that never occurred stay where they are, but for weight decay. DeepSpeed's own
    Lion moves such weights by lr. It keeps one state, half of AdamW's memory.
    """

    name = "lion"
    title = "Lion"
    Options = LionOptions
    positional = ("lr", "betas", "weight_decay")
    highest_usual_lr = 3e-3  # 3 to 10 times below AdamW's, says the paper
    states = (State("exp_avg"),)

    def scalars(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return beta1, 1 - beta1, beta2, 1 - beta2

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        lr: float,
        decay: float,
        scalars: Sequence[float],
    ) -> None:
        (exp_avg,) = states
        beta1, rest1, beta2, rest2 = scalars
        param.mul_(1 - lr * decay)
        mixed = (exp_avg * beta1).add_(grad, alpha=rest1)
        direction = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is not NaN everywhere
        param.add_(direction, alpha=-lr)
        exp_avg.mul_(beta2).add_(grad, alpha=rest2)

    cpp = CppBody("""
      const float beta1 = s[0], rest1 = s[1], beta2 = s[2], rest2 = s[3];
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float grad = static_cast<float>(g[i]), mixed = beta1 * first[i] + rest1 * grad;
        const float sign = mixed != mixed ? mixed : static_cast<float>((mixed > 0.0f) - (mixed < 0.0f));
        first[i] = beta2 * first[i] + rest2 * grad;
        p[i] = p[i] * keep - lr * sign;
      }
    """)

    @staticmethod
    def triton(param, grad, first, second, lr, keep, s):  # type: ignore[no-untyped-def]
        mixed = tl.load(s) * first + tl.load(s + 1) * grad
        sign = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # 0 and NaN stay what they are
        return param * keep - lr * sign, tl.load(s + 2) * first + tl.load(s + 3) * grad, second
