"""RAdam (arXiv 1908.03265) with one learning rate per block type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from ..blocks.types import BlockError
from .adamw import adam_scalars
from .base import CppBody, State, UpdateRule, tl
from .options import Betas, NotNegative, OptimizerOptions, one_of

SKIP, SGD = "skip", "sgd"
_SKIPPED, _SGD, _RECTIFIED = 0.0, 1.0, 2.0


class RAdamOptions(OptimizerOptions):
    """Those of RAdam."""

    betas: Annotated[Betas, Field(description="decay rates of the first and second moment")] = (0.9, 0.95)
    eps: Annotated[
        NotNegative, Field(description="added to the root of the second moment, before its bias is corrected")
    ] = 1e-8
    unrectified: Annotated[
        str,
        one_of(SKIP, SGD),
        Field(
            description='what the first steps do, in which rho is too small: "skip" leaves weights, as the official '
            'code; "sgd" moves them by lr times the momentum, as torch.optim.RAdam, which grows with gradients and ratios'
        ),
    ] = SKIP
    rectify_above: Annotated[
        NotNegative,
        Field(
            description="steps with a larger rho are rectified; 5 as in the official code and torch, 4 as in the paper"
        ),
    ] = 5.0

    @model_validator(mode="after")
    def _some_step_is_rectified(self) -> RAdamOptions:
        if self.rectify_above < 4:
            raise BlockError(
                f"rectify_above is {self.rectify_above:g}; give 4 or above, below which there is no rectification"
            )
        beta2 = self.betas[1]
        if _longest(beta2) <= self.rectify_above:
            raise BlockError(
                f"betas are {self.betas}: rho stays at or below {_longest(beta2):.3g}, so no step is ever rectified (above "
                f"{self.rectify_above:g}); give a second beta nearer to 1, as 0.95"
            )
        return self


def _longest(beta2: float) -> float:
    return 2 / (1 - beta2) - 1


def rectification(beta2: float, step: int, above: float = 5.0) -> float | None:
    """RAdam's factor r_t on Adam's step; None where the variance of the second moment is not finite (rho <= ``above``).

    With rho_inf = 2 / (1 - b2) - 1 and rho = rho_inf - 2 t b2^t / (1 - b2^t), it is the root of
    (rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho).

    Args:
        beta2: decay rate of the second moment.
        step: t, from 1.
        above: the paper has 4; its code and torch 5.
    """
    longest = _longest(beta2)
    rho = longest - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= above:
        return None
    return ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)) ** 0.5


class RAdam(UpdateRule):
    r"""RAdam (arXiv 1908.03265) with one learning rate per block type and decoupled weight decay.

    Adam whose step is shortened while its second moment has seen few gradients, by r_t (:func:`rectification`)::

        p <- p (1 - lr wd)
        m <- m + (1 - b1) (g - m);    v <- b2 v + (1 - b2) g^2
        p <- p - lr r_t m / (1 - b1^t) sqrt(1 - b2^t) / (sqrt(v) + eps)

    The first steps (5, for any usual b2) cannot be rectified: p stays, weight decay included, or with ``unrectified="sgd"``
    p <- p (1 - lr wd) - lr m / (1 - b1^t). With that option and ratios 1 it is torch.optim.RAdam with
    decoupled_weight_decay, to the bit with the reference kernel.

    It is about as much warmup as a line over 2 / (1 - b2) steps: 2,000 with b2 = 0.999, but 49 with 0.95, which is no
    replacement for the paper's 1,000 steps.
    """

    name = "radam"
    title = "RAdam"
    Options = RAdamOptions
    positional = ("lr", "betas", "eps", "weight_decay")
    states = (State("exp_avg"), State("exp_avg_sq"))

    def scalars(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        rectified = rectification(group["betas"][1], step, group["rectify_above"])
        first = _SKIPPED if group["unrectified"] == SKIP else _SGD
        return *adam_scalars(group, step), rectified or 0.0, first if rectified is None else _RECTIFIED

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
        rest1, beta2, rest2, eps, correction1, correction2_sqrt, rectified, way = scalars
        exp_avg.lerp_(grad, rest1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=rest2)
        if way == _SKIPPED:
            return
        param.mul_(1 - lr * decay)
        step = (exp_avg / correction1).mul_(lr)
        if way == _RECTIFIED:
            step.mul_(correction2_sqrt / exp_avg_sq.sqrt().add_(eps)).mul_(rectified)
        param.sub_(step)

    cpp = CppBody("""
      const float rest1 = s[0], beta2 = s[1], rest2 = s[2], eps = s[3], way = s[7];
      const float step = way > 1.0f ? lr / s[4] * s[5] * s[6] : lr / s[4];
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float grad = static_cast<float>(g[i]);
        first[i] = first[i] + rest1 * (grad - first[i]);
        second[i] = beta2 * second[i] + rest2 * grad * grad;
      }
      if (way > 1.0f) {
    #pragma omp simd
        for (int64_t i = 0; i < n; ++i) p[i] = p[i] * keep - step * (first[i] / (std::sqrt(second[i]) + eps));
      } else if (way > 0.0f) {
    #pragma omp simd
        for (int64_t i = 0; i < n; ++i) p[i] = p[i] * keep - step * first[i];
      }
    """)

    @staticmethod
    def triton(param, grad, first, second, lr, keep, s):  # type: ignore[no-untyped-def]
        rest1, beta2, rest2, way = tl.load(s), tl.load(s + 1), tl.load(s + 2), tl.load(s + 7)
        first = first + rest1 * (grad - first)
        second = beta2 * second + rest2 * grad * grad
        adaptive = tl.load(s + 5) * tl.load(s + 6) / (tl.sqrt_rn(second) + tl.load(s + 3))
        factor = tl.where(way > 1, adaptive, 1.0)
        moved = param * keep - lr / tl.load(s + 4) * (first * factor)
        return tl.where(way > 0, moved, param), first, second
