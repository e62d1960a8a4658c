"""The paper's schedule: every block type warms up from 0 to its own peak and decays to one shared minimum."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..blocks.types import BlockError, BlockType, shown
from ..rules.options import as_number
from ..rules.param_groups import ratio_now, set_lr, state_block_lrs

log = logging.getLogger("blockwise_lr")


def warmup_cosine(step: int, warmup: int, total: int) -> tuple[float, float]:
    """(weight of the peak, weight of min_lr) at the ``step``-th update, counted from 1.

    Warmup is linear and reaches the peak at update number ``warmup``; the cosine reaches min_lr at update ``total`` and
    stays there. A learning rate is peak * first + min_lr * second, for every block type with its own peak (arXiv
    2502.19002; the official code's get_lr, whose update 0 with a rate of 0 is left out).
    """
    if step <= warmup:
        return step / warmup, 0.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress))
    return weight, 1.0 - weight


class BlockwiseWarmupCosine(LRScheduler):
    """Learning rates per block type: linear warmup to ratio * lr, then a cosine to one min_lr shared by all.

    For a BlockwiseAdamW or BlockwiseAdamMini it sets ``lr`` (that of ratio 1) and states every block type's rate; for any
    other optimizer, ``lr`` of every group. A block type whose peak is below min_lr stays at its peak: no rate rises while
    the others decay. The peak is the rate the optimizer was built with, also where its state was loaded before. Usable as a
    DeepSpeed scheduler type and as a torch scheduler: one call of ``step`` per optimizer step.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's wrapper of one.
        total_num_steps: optimizer steps until min_lr is reached.
        warmup_num_steps: optimizer steps of warmup; 0 starts at the peak.
        min_lr: the shared final learning rate; the optimizer's own ``min_lr``, or else lr / 20, by default.
        last_batch_iteration: number of optimizer steps done, less one; -1 for a fresh start.

    Raises:
        BlockError: counts that are not whole or out of order, or min_lr above a group's lr.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_num_steps: int = 0,
        min_lr: float | None = None,
        last_batch_iteration: int = -1,
    ) -> None:
        for name, value, least in (
            ("total_num_steps", total_num_steps, 1),
            ("warmup_num_steps", warmup_num_steps, 0),
            ("last_batch_iteration", last_batch_iteration, -1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BlockError(
                    f"BlockwiseWarmupCosine: {name} is {shown(value)}; give a whole number of optimizer steps, "
                    f"{least} or above"
                )
        if warmup_num_steps > total_num_steps:
            raise BlockError(
                f"BlockwiseWarmupCosine: warmup_num_steps is {warmup_num_steps} and total_num_steps is "
                f"{total_num_steps}; warm up in fewer steps than there are"
            )
        inner = _torch_optimizer(optimizer)
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        for group, peak in zip(inner.param_groups, _peaks(inner)):
            group["initial_lr"] = peak
        self.min_lrs = [_group_min_lr(min_lr, group) for group in inner.param_groups]
        super().__init__(inner, last_batch_iteration)

    @property
    def last_batch_iteration(self) -> int:
        """Number of optimizer steps done, less one."""
        return self.last_epoch - 1

    @property
    def peaks(self) -> list[float]:
        """The peak of each param group's base learning rate."""
        return [float(lr) for lr in self.base_lrs]

    def _weights(self) -> tuple[float, float]:
        return warmup_cosine(self.last_epoch + 1, self.warmup_num_steps, self.total_num_steps)

    def get_lr(self) -> list[float]:
        """The base learning rate of each param group (that of ratio 1) for the next optimizer step."""
        weight, floor = self._weights()
        return [weight * peak + floor * low for peak, low in zip(self.peaks, self.min_lrs)]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """One optimizer step is done; with a number, that one is."""
        if last_batch_iteration is not None:
            self.last_epoch = last_batch_iteration
        super().step()
        self._state_block_lrs()

    def _update_lr(self, epoch: int | None = None) -> None:  # torch's SequentialLR calls it past step
        super()._update_lr(epoch)
        self._state_block_lrs()

    def _state_block_lrs(self) -> None:
        weight, floor = self._weights()
        for group, peak, low in zip(self.optimizer.param_groups, self.peaks, self.min_lrs):
            if "block_lr_ratios" in group:
                tops = {block: ratio_now(group, BlockType(block)) * peak for block in group["block_lr_ratios"]}
                state_block_lrs(group, {block: weight * top + floor * min(low, top) for block, top in tops.items()})

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_batch_iteration": self.last_batch_iteration,
            "total_num_steps": self.total_num_steps,
            "warmup_num_steps": self.warmup_num_steps,
            "peaks": self.peaks,
            "min_lrs": self.min_lrs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step, on this scheduler's own settings; logs where these are not the saved ones.

        Raises:
            BlockError: there is no state, or that of a scheduler that does not count as this one does.
        """
        saved = state_dict.get("last_batch_iteration") if isinstance(state_dict, Mapping) else None
        if not isinstance(saved, int):
            raise BlockError(
                "the checkpoint's scheduler state does not say where BlockwiseWarmupCosine is to go on (it was "
                "saved without a scheduler, or with another); load with load_lr_scheduler_states=False and "
                "call the scheduler's step(last_batch_iteration=optimizer steps done - 1)"
            )
        for key, now in self.state_dict().items():
            if key != "last_batch_iteration" and state_dict.get(key, now) != now:
                log.warning(
                    "BlockwiseWarmupCosine goes on with %s = %s; the checkpoint had %s", key, now, state_dict[key]
                )
        self.last_epoch = saved + 1
        for group, lr in zip(self.optimizer.param_groups, self.get_lr()):
            set_lr(group, lr)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._state_block_lrs()


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in what a framework wrapped around it."""
    found = optimizer
    while not isinstance(found, torch.optim.Optimizer) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer):
        raise BlockError(f"BlockwiseWarmupCosine needs a torch optimizer, got {type(optimizer).__name__}")
    return found


def _peaks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The rates a schedule starts from: ``lr`` of a loaded optimizer is that of the step it was saved at."""
    built = getattr(optimizer, "built_lrs", None)
    return [
        group.get("initial_lr", group["lr"] if built is None else lr)
        for group, lr in zip(optimizer.param_groups, built or [None] * len(optimizer.param_groups))
    ]


def _group_min_lr(min_lr: float | None, group: dict[str, Any]) -> float:
    peak = float(group["initial_lr"])
    value = min_lr if min_lr is not None else group.get("block_min_lr")
    value = peak / 20 if value is None else value
    try:
        number = as_number(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= peak:
        raise BlockError(
            f"BlockwiseWarmupCosine: min_lr is {shown(value)} and lr is {peak!r}; give a min_lr from 0 up to lr"
        )
    return number
