"""Linear warmup and cosine decay per block type, from a peak of its own to one shared minimum (arXiv 2502.19002)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..blocks.types import BlockError, shown
from ..rules.options import as_number
from ..rules.param_groups import ratio_now, set_lr, state_block_lrs

log = logging.getLogger("blockwise_lr")


def warmup_cosine(step: int, warmup: int, total: int) -> tuple[float, float]:
    """The coefficients (a, b) of lr = a * peak + b * min_lr at an update.

    For step <= warmup: a = step / warmup, b = 0. Then, with t = (step - warmup) / (total - warmup), at most 1:
    a = (1 + cos(pi t)) / 2, b = 1 - a. Every block type has its own peak and all share min_lr. Source: get_lr of the
    official code of arXiv 2502.19002, without its update 0, whose learning rate is 0.

    Args:
        step: the number of the update, from 1.
        warmup: updates until the peak is reached.
        total: updates until min_lr is reached.
    """
    if step <= warmup:
        return step / warmup, 0.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress))
    return weight, 1.0 - weight


class BlockwiseWarmupCosine(LRScheduler):
    """Linear warmup to ratio * lr per block type, then cosine decay to one shared min_lr.

    For a blockwise optimizer it sets the base ``lr`` (ratio 1) and the learning rate of every block type; for any other
    optimizer, ``lr`` of every group. A block type whose peak is below min_lr stays at its peak. The peak is the
    learning rate the optimizer was built with, even if its state was loaded before. Works as a DeepSpeed scheduler type
    and as a torch scheduler: one call of ``step`` per optimizer step. Formula: :func:`warmup_cosine`.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's wrapper of one.
        total_num_steps: optimizer steps until min_lr is reached.
        warmup_num_steps: optimizer steps of warmup; 0 starts at the peak.
        min_lr: the shared final learning rate; by default the optimizer's ``min_lr``, or lr / 20 if it has none.
        last_batch_iteration: number of completed optimizer steps minus one; -1 for a fresh start.

    Raises:
        BlockError: step counts that are not integers or out of range, or min_lr above a group's lr.
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
        """Number of completed optimizer steps minus one."""
        return self.last_epoch - 1

    @property
    def peaks(self) -> list[float]:
        """The peak of each param group's base learning rate."""
        return [float(lr) for lr in self.base_lrs]

    def _weights(self) -> tuple[float, float]:
        return warmup_cosine(self.last_epoch + 1, self.warmup_num_steps, self.total_num_steps)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The base learning rate (ratio 1) of each param group for the next optimizer step."""
        return list(self._base_lrs())

    def _base_lrs(self) -> list[float]:
        weight, floor = self._weights()
        return [weight * peak + floor * low for peak, low in zip(self.peaks, self.min_lrs)]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advances by one optimizer step, or to the given ``last_batch_iteration``."""
        if last_batch_iteration is not None:
            self.last_epoch = last_batch_iteration
        super().step()
        self._state_block_lrs()

    def _update_lr(self, epoch: int | None = None) -> None:  # torch's SequentialLR calls it instead of step
        super()._update_lr(epoch)
        self._state_block_lrs()

    def _state_block_lrs(self) -> None:
        weight, floor = self._weights()
        for group, peak, low in zip(self.optimizer.param_groups, self.peaks, self.min_lrs):
            if "block_lr_ratios" in group:
                tops = {block: ratio_now(group, block) * peak for block in group["block_lr_ratios"]}
                state_block_lrs(group, {block: weight * top + floor * min(low, top) for block, top in tops.items()})

    def state_dict(self) -> dict[str, Any]:
        """The step and the settings, which :meth:`load_state_dict` compares with its own."""
        return {
            "last_batch_iteration": self.last_batch_iteration,
            "total_num_steps": self.total_num_steps,
            "warmup_num_steps": self.warmup_num_steps,
            "peaks": self.peaks,
            "min_lrs": self.min_lrs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step with this scheduler's own settings; logs those that differ from the saved ones.

        Raises:
            BlockError: ``state_dict`` is not the state of a BlockwiseWarmupCosine.
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
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs()):
            set_lr(group, lr)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._state_block_lrs()


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a framework's wrappers."""
    found = optimizer
    while not isinstance(found, torch.optim.Optimizer) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer):
        raise BlockError(f"BlockwiseWarmupCosine needs a torch optimizer, got {type(optimizer).__name__}")
    return found


def _peaks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The learning rates the optimizer was built with; after loading, ``lr`` is that of the saved step."""
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
