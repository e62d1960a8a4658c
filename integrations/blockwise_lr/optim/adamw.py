"""AdamW with one learning rate per block type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..blocks import BlockMap, ParamLayout
from ..kernels import StepValues
from ..plan.shards import Fragment
from ..plan.step_plan import StepPlan, element_plan
from .base import BlockwiseOptimizer
from .tensors import empty_moment, row


class BlockwiseAdamW(BlockwiseOptimizer):
    r"""AdamW with one learning rate per block type (Blockwise LR, arXiv 2502.19002).

    Every element follows torch.optim.AdamW with the learning rate of its block type: ratio x lr. With all ratios 1 it is
    torch.optim.AdamW, to the bit with the reference kernel.

    Args:
        params: ``model.named_parameters()``, or param groups of such pairs, as torch.optim takes them; tensors without
            names where ``block_map`` comes from their model. A group may have options of its own: its ``lr`` is the base
            rate that ratios multiply in it, its ``weight_decay`` holds for everything in it, and ratios that it does not
            name are the paper's.
        lr: the base learning rate, that of the norms.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; not applied to norms and biases by default.
        block_map: from :func:`blockwise_lr.map_blocks`; needed where names do not tell the layout (fused, interleaved
            or transposed QKV). Made from the names otherwise.
        block_lr_ratios: peak learning rate of block types over ``lr``; those not named keep the paper's (embedding 10,
            qk 8, ffn 6, vo 4, norm 1; the head follows the embedding).
        block_weight_decay: weight decay of block types, in place of ``weight_decay``.
        decay_norms_and_biases: decay everything, as the paper's experiments do.
        min_lr: what :class:`~blockwise_lr.schedules.BlockwiseWarmupCosine` lets all block types decay to; lr / 20 by
            default. Other schedulers do not use it.
        block_rules: naming rules of your own, where no block_map is given.
        kernel: "auto", or a kernel's name (see :mod:`blockwise_lr.kernels`).
        accept_mismatch: in what a loaded checkpoint may contradict this run, which goes on with its own settings then:
            any of optimizer, block_map, block_lr_ratios and the other settings' names. Nothing by default.
        ratio_fade_steps: over how many optimizer steps accepted new ratios take over from the checkpoint's (from 1 where
            it is a plain AdamW's); 0: at once.

    Raises:
        BlockError: a value out of range, an unknown block type, or a parameter that is not mapped.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        block_map: BlockMap | None = None,
        block_lr_ratios: Mapping[str, float] | None = None,
        block_weight_decay: Mapping[str, float] | None = None,
        decay_norms_and_biases: bool = False,
        min_lr: float | None = None,
        block_rules: Iterable[dict] | None = None,
        kernel: str = "auto",
        accept_mismatch: Iterable[str] = (),
        ratio_fade_steps: int = 0,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                block_lr_ratios=block_lr_ratios,
                block_weight_decay=block_weight_decay,
                decay_norms_and_biases=decay_norms_and_biases,
                min_lr=min_lr,
                block_rules=block_rules,
                kernel=kernel,
                accept_mismatch=accept_mismatch,
                ratio_fade_steps=ratio_fade_steps,
            ),
            block_map=block_map,
        )

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        return element_plan(numel, fragments, layouts)

    def _second_moment(self, tensor: torch.Tensor) -> torch.Tensor:
        return empty_moment(tensor)

    def second_numel(self, tensor: torch.Tensor) -> int:
        return self.plan_of(tensor).numel

    def _step(self, work: list[tuple[torch.Tensor, StepValues]]) -> None:
        for p, values in work:
            with self._rows(p) as (param, grad, exp_avg):
                self._kernel(p).adamw(
                    param, grad, exp_avg, row(self.state[p]["exp_avg_sq"]), self.plan_of(p), values, self.copy_of(p)
                )
