"""Adam-mini (arXiv 2406.16793): AdamW with one second moment per segment in place of one per element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from ..blocks.layout import ParamLayout
from ..plan.step_plan import element_biases
from .adamw import AdamWOptions, adam_scalars
from .base import CppBody, State, UpdateRule, tl
from .options import one_of

BIAS_SEGMENTS = ("element", "vector")


class AdamMiniOptions(AdamWOptions):
    """Those of Adam-mini."""

    NOT_OF_GROUPS: ClassVar[tuple[str, ...]] = (*AdamWOptions.NOT_OF_GROUPS, "bias_segments")

    bias_segments: Annotated[
        str,
        one_of(*BIAS_SEGMENTS),
        Field(
            description='"element" (the default: as the official code, at a cost of memory that cannot be measured, and a '
            'fused bias of q, k and v needs no sums over ranks) or "vector" (one per bias vector)'
        ),
    ] = "element"


class AdamMini(UpdateRule):
    r"""Adam-mini (arXiv 2406.16793) with one learning rate per block type; all ratios 1 give plain Adam-mini.

    It keeps one second moment per *segment*, the mean of its squared gradients, in place of one per element::

        p <- p (1 - lr wd)
        m <- m + (1 - b1) (g - m);    v <- b2 v + (1 - b2) mean(g^2 over the segment)
        p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    ==============  ========================================  ===============================================
    block           segment                                   source
    ==============  ========================================  ===============================================
    embedding, head a token's row                             paper's partition; official embd_names, output_names
    q, k            a head                                    paper's partition; official wqk_names (k by its own
                                                              heads under grouped-query attention)
    v, o, ffn       an output neuron's row                    paper's partition; official wv_names,
                                                              attn_proj_names, mlp_names
    router, ssm     an output row                             not in the paper; as other linear layers
    norm            the whole vector                          official v1.1.1, "other blocks"
    bias            an element, or the vector                 official v1.1.1 uses plain Adam for biases
    ==============  ========================================  ===============================================

    Rows and heads are those of the unfused model wherever fused weights keep them, and a segment that is shared by several
    shards or tensor-parallel ranks keeps one second moment: its parts' sums of squares are added over the ranks by one
    small all-reduce per process group and step, started before and awaited after the step of all other segments.

    A block_map that knows the number of heads is needed (``map_blocks(model)`` of a model with a config). The state per
    tensor is ``exp_avg`` (its shape) and ``exp_avg_sq`` (segments of this shard,). During a step it needs memory for one
    float per segment and, in the reference kernel, three tiles of 4 MiB, or of the largest segment.
    """

    name = "adam_mini"
    title = "AdamMini"
    Options = AdamMiniOptions
    positional = ("lr", "betas", "eps", "weight_decay")
    states = (State("exp_avg"), State("exp_avg_sq", per="segment"))

    def segments(self, layout: ParamLayout, bias_segments: str | None) -> ParamLayout:
        return element_biases(layout) if bias_segments == "element" else layout

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
        exp_avg, moment = states
        rest1, _, _, eps, correction1, correction2_sqrt = scalars
        param.mul_(1 - lr * decay)
        exp_avg.lerp_(grad, rest1)
        denominator = (moment.sqrt() / correction2_sqrt).add_(eps)
        param.addcdiv_(exp_avg, denominator.to(param.dtype), value=-(lr / correction1))

    def next_moment(self, moment: torch.Tensor, mean_square: torch.Tensor, scalars: Sequence[float]) -> None:
        moment.mul_(scalars[1]).add_(mean_square, alpha=scalars[2])

    # the sum of squares has just read the gradient, which is still in the cache
    cpp = CppBody(
        update="""
      const float rest1 = s[0];
      float firsts[burst];
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        first[i] = firsts[i] = first[i] + rest1 * (static_cast<float>(g[i]) - first[i]);
    #pragma omp simd
      for (int64_t i = 0; i < n; ++i) p[i] = p[i] * keep - of_segment * firsts[i];
    """,
        moment="s[1] * moment + s[2] * mean",
        of_segment="lr / s[4] / (std::sqrt(moment) / s[5] + s[3])",
    )

    @staticmethod
    def triton(param, grad, first, second, lr, keep, s):  # type: ignore[no-untyped-def]
        first = first + tl.load(s) * (grad - first)
        step = lr / tl.load(s + 4) / (tl.sqrt_rn(second) / tl.load(s + 5) + tl.load(s + 3))
        return param * keep - step * first, first, second

    @staticmethod
    def triton_moment(moment, mean, s):  # type: ignore[no-untyped-def]
        return tl.load(s + 1) * moment + tl.load(s + 2) * mean
