"""The schedulers' classes: one for each curve."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..blocks.types import BlockError
from .base import BlockwiseSchedule, rates_now
from .shapes import WSD, Infinite, Rewarm, WarmupConstant, WarmupCosine, WarmupInverseSqrt, WarmupLinear

log = logging.getLogger("blockwise_lr")


class BlockwiseWarmupCosine(BlockwiseSchedule):
    """Linear warmup to ratio * lr per block type, then cosine decay to one shared min_lr (arXiv 2502.19002)."""

    curve_type = WarmupCosine


class BlockwiseWarmupLinear(BlockwiseSchedule):
    curve_type = WarmupLinear


class BlockwiseWarmupConstant(BlockwiseSchedule):
    curve_type = WarmupConstant


class BlockwiseWarmupInverseSqrt(BlockwiseSchedule):
    curve_type = WarmupInverseSqrt


class BlockwiseWSD(BlockwiseSchedule):
    curve_type = WSD


class BlockwiseRewarm(BlockwiseSchedule):
    curve_type = Rewarm
    curve: Rewarm

    def _first_starts(self, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
        """At the rate of a state that is loaded already; at 0 for a fresh optimizer, whose rates are the peaks."""
        stated = [self.curve.starts(list(rates_now(group))) for group in optimizer.param_groups]
        loaded = _loaded_rates(optimizer) if optimizer.state else [{} for _ in stated]
        return [starts if rates is None else rates for rates, starts in zip(stated, loaded)]

    def _optimizer_was_loaded(self) -> None:
        """Without the old run's scheduler the loaded optimizer alone tells its rates."""
        if not self._resumed and self.curve.starts([]) is None and self.last_epoch == 0 == self.curve.begin_num_steps:
            self.start_lrs = _loaded_rates(self.optimizer)
            self.set_rates()
        super()._optimizer_was_loaded()

    def _take_over(self, state_dict: Mapping[str, Any]) -> None:
        begin, unit = self.curve.begin_num_steps, "steps" if self.curve.tokens_per_step is None else "tokens"
        done = state_dict["last_batch_iteration"] + 1
        if unit == "tokens":
            counted = state_dict.get("tokens_per_step") is not None
            done = state_dict["tokens"] if counted else done * (self.curve.tokens_per_step or 1)
        if done < begin:
            raise BlockError(
                f"BlockwiseRewarm: the checkpoint has done {done} {unit} and begin_num_steps is {begin}; write "
                f'"begin_num_steps": {done} to begin there'
            )
        again = state_dict.get("schedule") == "BlockwiseRewarm" and state_dict.get("begin_num_steps") == begin
        if not again and done > begin:
            log.warning(
                "BlockwiseRewarm begins at %d %s and the checkpoint has done %d, so its first rates are passed over",
                begin,
                unit,
                done,
            )
        if again:
            self.start_lrs = [dict(starts) for starts in state_dict["start_lrs"]]
        elif self.curve.starts([]) is None:
            if "block_lrs" not in state_dict:
                raise BlockError(
                    "BlockwiseRewarm: the checkpoint's scheduler state does not hold its learning rates (it is of 0.3 or "
                    "before); give start_lr, as the min_lr of that run"
                )
            self.start_lrs = [dict(rates) for rates in state_dict["block_lrs"]]


def _loaded_rates(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Where block types begin after an optimizer was loaded without its scheduler: its state says the base rate alone, which at
    the end of a schedule is that of all."""
    return [dict.fromkeys(rates_now(group), float(group["lr"])) for group in optimizer.param_groups]


class BlockwiseInfinite(BlockwiseSchedule):
    curve_type = Infinite
    curve: Infinite

    def anneal(self, num_steps: int) -> None:
        """Begins the anneal after the optimizer steps (tokens) done so far.

        Args:
            num_steps: of the anneal; training ends there.

        Raises:
            BlockError: not a whole number above 0, or a min_lr of 0, which an exponential decay never reaches.
        """
        done = self.last_epoch if self.curve.tokens_per_step is None else self.tokens
        self._anneal({"anneal_begin_num_steps": done, "anneal_num_steps": num_steps})

    def _anneal(self, settings: Mapping[str, Any]) -> None:
        curve = Infinite.checked({**self.curve.given(), **settings}, "BlockwiseInfinite: ")
        for low in self.min_lrs:
            curve.refuse_low(low)
        self.curve = curve
        self.set_rates()

    def _take_over(self, state_dict: Mapping[str, Any]) -> None:
        """An anneal that was begun by :meth:`anneal` goes on."""
        keys = ("anneal_begin_num_steps", "anneal_num_steps")
        if self.curve.anneal_begin_num_steps is None and state_dict.get(keys[0]) is not None:
            self._anneal({key: state_dict[key] for key in keys})


SCHEDULES: dict[str, type[BlockwiseSchedule]] = {
    kind.__name__: kind
    for kind in (
        BlockwiseWarmupCosine,
        BlockwiseWarmupLinear,
        BlockwiseWarmupInverseSqrt,
        BlockwiseWarmupConstant,
        BlockwiseWSD,
        BlockwiseRewarm,
        BlockwiseInfinite,
    )
}
