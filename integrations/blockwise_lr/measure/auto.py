"""Ratios from what each block type's updates do to the loss, found while the model trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from ..blocks import BlockError, BlockType
from ..collective.errors import is_rank_zero
from ..optim.base import BlockwiseOptimizer
from .parts import Predictions, causal_lm, several_times
from .updates import Updates, measure_updates, snapshot

log = logging.getLogger("blockwise_lr")


def rebalanced(
    ratios: Mapping[BlockType | str, float], updates: Updates, *, power: float = 0.5, most: float = 4.0
) -> dict[BlockType | str, float]:
    """Ratios moved towards those at which all block types' multipliers are equal (see :mod:`.updates`).

    ratio_b *= (multiplier_b / their mean) ** power, where the mean is geometric and weighted by the block types' elements:
    what most of the weights train at stays as it is, so the base learning rate keeps its meaning.

    Args:
        ratios: of all block types of the model, as they were in the step that was measured.
        power: 1 goes all the way at once; less averages over measurements.
        most: the largest factor, up or down, of one measurement. A block type whose move went up the slope gets the lowest.
    """
    numel = dict(zip(updates.blocks, updates.numel))
    lowest = -2 * math.log(most)
    wanted: dict[BlockType | str, float] = {
        block: power * math.log(value) if value > 0 and math.isfinite(value) else lowest
        for block, (value, _) in updates.multipliers().items()
    }
    for _ in range(2):  # clipping moves the mean
        mean = sum(wanted[block] * size for block, size in numel.items()) / sum(numel.values())
        wanted = {block: min(max(value - mean, -math.log(most)), math.log(most)) for block, value in wanted.items()}
    return {block: ratio * math.exp(wanted.get(block, 0.0)) for block, ratio in ratios.items()}


class AutoRatios:
    """Steps an optimizer, and after some of its steps measures what they did and rebalances its ratios.

    The ratios are saved and loaded with the optimizer's state. Every rank measures on batches of its own, and all get the
    same ratios. A measurement costs about (block types + 1) / 3 of a training step on as many tokens.

    Example::

        auto = AutoRatios(model, optimizer, held_out_batches, at={100, 300, 1000})
        ...
        loss.backward()
        auto.step()  # in place of optimizer.step()
        schedule.step()

    Args:
        model: whose whole float32 parameters the optimizer steps: no engine that shards, or that keeps masters of its own.
        optimizer: a blockwise one; its ratios when it is built are where the search starts.
        batches: of data that the steps do not see: a list, or a function that is called for each measurement.
        at: the numbers of the optimizer steps, from 1, after which to measure. Not earlier than the end of the warmup: at
            initialization the order of the blocks is another one.
        power, most: see :func:`rebalanced`.
        predictions: see :func:`~blockwise_lr.measure.measure_updates`.

    Raises:
        BlockError: another optimizer, or settings out of range.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[], Iterable[Any]] | Iterable[Any],
        at: Collection[int],
        *,
        power: float = 0.5,
        most: float = 4.0,
        predictions: Predictions = causal_lm,
    ) -> None:
        if not isinstance(optimizer, BlockwiseOptimizer):
            raise BlockError(f"AutoRatios needs a blockwise optimizer, not {type(optimizer).__name__}")
        if optimizer.block_map.own_blocks:
            raise BlockError(
                f"block_rules make blocks of your own ({', '.join(optimizer.block_map.own_blocks)}), and AutoRatios measures "
                f"block types; leave out name and lr_ratio in these rules (lr_scale goes along)"
            )
        if not 0 < power <= 1 or not most > 1:
            raise BlockError(f"power is {power} and most is {most}; give a power above 0, up to 1, and most above 1")
        self.model, self.optimizer, self.at = model, optimizer, frozenset(at)
        self.batches = several_times(batches)
        self.power, self.most, self.predictions = power, most, predictions
        self.history: list[tuple[int, Updates, dict[BlockType | str, float]]] = []

    def steps_done(self) -> int:
        """Optimizer steps, counting those before a resume."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step, measured where it is due."""
        number = self.steps_done() + 1
        if number not in self.at:
            return self.optimizer.step(closure)
        before = snapshot(self.model)
        loss = self.optimizer.step(closure)
        self._measure(number, before)
        return loss

    def _measure(self, number: int, before: Mapping[str, torch.Tensor]) -> None:
        updates = measure_updates(
            self.model, before, self.batches(), block_map=self.optimizer.block_map, predictions=self.predictions
        )
        ratios = rebalanced(self.optimizer.block_lr_ratios, updates, power=self.power, most=self.most)
        self.optimizer.set_block_lr_ratios({str(block): ratio for block, ratio in ratios.items()})
        self.history.append((number, updates, ratios))
        if is_rank_zero():
            said = ", ".join(f"{block.value} {ratios[block]:.3g}" for block in updates.blocks)
            log.info("after step %d the learning-rate ratios are %s", number, said)
