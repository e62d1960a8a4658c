"""The paper's schedule: every block type warms up from 0 to its own peak and decays to one shared minimum."""
from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..blocks.types import BlockError

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


class BlockwiseWarmupCosine:
    """Learning rates per block type: linear warmup to ratio * lr, then a cosine to one min_lr shared by all.

    For a BlockwiseAdamW or BlockwiseAdamMini it sets ``lr`` (that of ratio 1) and ``lr_floor`` of every group; for any
    other optimizer, ``lr`` of every group, whose peak is what the group had at the start. Usable as a DeepSpeed scheduler
    type and as a torch scheduler: one call of ``step`` per optimizer step.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's wrapper of one.
        total_num_steps: optimizer steps until min_lr is reached.
        warmup_num_steps: optimizer steps of warmup; 0 starts at the peak.
        min_lr: the shared final learning rate; the optimizer's own ``min_lr``, or else lr / 20, by default.
        last_batch_iteration: number of optimizer steps done, less one; -1 for a fresh start.

    Raises:
        BlockError: counts that are not whole or out of order, or min_lr above a group's lr.
    """

    def __init__(self, optimizer: Any, total_num_steps: int, warmup_num_steps: int = 0, min_lr: float | None = None,
                 last_batch_iteration: int = -1) -> None:
        for name, value in (("total_num_steps", total_num_steps), ("warmup_num_steps", warmup_num_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BlockError(f"BlockwiseWarmupCosine: {name} is {value!r}; give a whole number of optimizer steps")
        if not warmup_num_steps <= total_num_steps or total_num_steps == 0:
            raise BlockError(f"BlockwiseWarmupCosine: warmup_num_steps is {warmup_num_steps} and total_num_steps is "
                             f"{total_num_steps}; warm up in fewer steps than there are")
        self.optimizer = _torch_optimizer(optimizer)
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.min_lrs = [_group_min_lr(min_lr, group, peak)
                        for group, peak in zip(self.optimizer.param_groups, self.peaks)]
        self.last_batch_iteration = last_batch_iteration
        self._apply()

    def _apply(self) -> None:
        """Sets what the next optimizer step is to use."""
        peak_weight, floor_weight = warmup_cosine(self.last_batch_iteration + 2, self.warmup_num_steps,
                                                  self.total_num_steps)
        for group, peak, min_lr in zip(self.optimizer.param_groups, self.peaks, self.min_lrs):
            floor = floor_weight * min_lr
            lr = peak_weight * peak + floor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if "lr_floor" in group:
                group["lr_floor"] = floor

    def step(self, last_batch_iteration: int | None = None) -> None:
        """One optimizer step is done."""
        self.last_batch_iteration = (self.last_batch_iteration + 1 if last_batch_iteration is None
                                     else last_batch_iteration)
        self._apply()

    def get_lr(self) -> list[float]:
        """The base learning rate of each param group (that of ratio 1)."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """As :meth:`get_lr`."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration, "total_num_steps": self.total_num_steps,
                "warmup_num_steps": self.warmup_num_steps, "peaks": self.peaks, "min_lrs": self.min_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step, on this scheduler's own settings; logs where these are not the saved ones.

        Raises:
            BlockError: there is no state, or that of a scheduler that does not count as this one does.
        """
        saved = state_dict.get("last_batch_iteration") if isinstance(state_dict, Mapping) else None
        if not isinstance(saved, int):
            raise BlockError("the checkpoint's scheduler state does not say where BlockwiseWarmupCosine is to go on (it was "
                             "saved without a scheduler, or with another); load with load_lr_scheduler_states=False and "
                             "call the scheduler's step(last_batch_iteration=optimizer steps done - 1)")
        for key, now in self.state_dict().items():
            if key != "last_batch_iteration" and state_dict.get(key, now) != now:
                log.warning("BlockwiseWarmupCosine goes on with %s = %s; the checkpoint had %s", key, now, state_dict[key])
        self.last_batch_iteration = saved
        self._apply()


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(optimizer, "param_groups"):
        raise BlockError(f"BlockwiseWarmupCosine needs an optimizer with param_groups, got {type(optimizer).__name__}")
    return optimizer


def _group_min_lr(min_lr: float | None, group: dict[str, Any], peak: float) -> float:
    value = min_lr if min_lr is not None else group.get("min_lr")
    value = peak / 20 if value is None else value
    if not isinstance(value, (int, float)) or not 0 <= value <= peak:
        raise BlockError(f"BlockwiseWarmupCosine: min_lr is {value!r} and lr is {peak!r}; give a min_lr from 0 up to lr")
    return float(value)
