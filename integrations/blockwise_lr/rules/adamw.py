"""AdamW (arXiv 1711.05101) with one learning rate per block type (Blockwise LR, arXiv 2502.19002)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from .base import CppBody, State, UpdateRule, tl
from .options import Betas, NotNegative, OptimizerOptions


class AdamWOptions(OptimizerOptions):
    """Those of AdamW."""

    betas: Annotated[Betas, Field(description="decay rates of the first and second moment")] = (0.9, 0.95)
    eps: Annotated[NotNegative, Field(description="added to the root of the second moment")] = 1e-8


def adam_scalars(group: Mapping[str, Any], step: int) -> tuple[float, ...]:
    """1 - beta1, beta2, 1 - beta2, eps, 1 - beta1^step and the root of 1 - beta2^step."""
    beta1, beta2 = group["betas"]
    return 1 - beta1, beta2, 1 - beta2, group["eps"], 1 - beta1**step, (1 - beta2**step) ** 0.5


class AdamW(UpdateRule):
    r"""AdamW with one learning rate per block type (Blockwise LR, arXiv 2502.19002).

    Every element follows torch.optim.AdamW with the learning rate of its block type, lr = ratio x base rate::

        p <- p (1 - lr wd)
        m <- m + (1 - b1) (g - m);    v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    With all ratios 1 it is torch.optim.AdamW, to the bit with the reference kernel.
    """

    name = "adamw"
    title = "AdamW"
    Options = AdamWOptions
    positional = ("lr", "betas", "eps", "weight_decay")
    states = (State("exp_avg"), State("exp_avg_sq"))
    complex_as_pairs = True

    def scalars(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        return adam_scalars(group, step)

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        lr: float,
        decay: float,
        scalars: Sequence[float],
    ) -> None:
        exp_avg, exp_avg_sq = states
        rest1, beta2, rest2, eps, correction1, correction2_sqrt = scalars
        param.mul_(1 - lr * decay)
        exp_avg.lerp_(grad, rest1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=rest2)
        denominator = (exp_avg_sq.sqrt() / correction2_sqrt).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-(lr / correction1))

    # memory is read in bursts, one array after another
    cpp = CppBody("""
      const float rest1 = s[0], beta2 = s[1], rest2 = s[2], eps = s[3], step = lr / s[4], inverse_root = 1.0f / s[5];
      float grads[burst], firsts[burst], seconds[burst];
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i) grads[i] = static_cast<float>(g[i]);
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i) first[i] = firsts[i] = first[i] + rest1 * (grads[i] - first[i]);
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i) second[i] = seconds[i] = beta2 * second[i] + rest2 * grads[i] * grads[i];
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        p[i] = p[i] * keep - step * (firsts[i] / (std::sqrt(seconds[i]) * inverse_root + eps));
    """)

    @staticmethod
    def triton(param, grad, first, second, lr, keep, s):  # type: ignore[no-untyped-def]
        rest1, beta2, rest2 = tl.load(s), tl.load(s + 1), tl.load(s + 2)
        first = first + rest1 * (grad - first)
        second = beta2 * second + rest2 * grad * grad
        denominator = tl.sqrt_rn(second) / tl.load(s + 5) + tl.load(s + 3)
        return param * keep - lr / tl.load(s + 4) * (first / denominator), first, second
