"""Signal and noise of each block type's gradient, and the batch at which they are equal (arXiv 1812.06162).

From pairs of batches, with the data's own labels: gradients a and b of one pair have a.b as an unbiased estimate of the
signal, the square of the mean gradient, and |a - b|^2 / 2 of the noise, the trace of the covariance of one batch's gradient.
That rates should follow the ratio of the two is the claim of MoLS (arXiv 2605.05794), whose own estimator is another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..blocks import BlockError, BlockMap, BlockType, map_blocks
from ..collective.agreement import gathered
from ..collective.errors import run_on_all_ranks
from .gradients import Gradients
from .labels import logit_gradient, predicted
from .parts import BlockParts, Predictions, as_it_was, causal_lm

Key = tuple[str, BlockType]


@dataclass(frozen=True)
class Noise:
    """A block's gradient in several pairs of batches.

    Attributes:
        signals: of each pair, the estimate of the squared mean gradient; may be negative.
        noises: of each pair, that of the trace of the covariance of one batch's gradient.
    """

    signals: tuple[float, ...]
    noises: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Signal over noise, for batches as they were measured."""
        return sum(self.signals) / sum(self.noises)

    @property
    def error(self) -> float:
        """Standard error of the ratio by the jackknife over pairs; nan for one pair."""
        count = len(self.signals)
        if count < 2:
            return math.nan
        signals, noises = np.array(self.signals), np.array(self.noises)
        without = (signals.sum() - signals) / (noises.sum() - noises)
        return float(np.sqrt(((without - without.mean()) ** 2).sum() * (count - 1) / count))


@dataclass(frozen=True)
class GradientNoise:
    """What was measured.

    Attributes:
        parts: (parameter, block type) -> its signal and noise.
        tokens: predicted tokens of a batch, the mean over batches.
    """

    parts: Mapping[Key, Noise]
    tokens: float

    def blocks(self) -> dict[BlockType, Noise]:
        """Per block type, over the whole model."""
        return self.grouped(lambda _, block: block)

    def grouped(self, key: Callable[[str, BlockType], Any]) -> dict[Any, Noise]:
        """Signals and noises added up by a key of parameter and block type."""
        found: dict[Any, list[Noise]] = {}
        for (name, block), part in self.parts.items():
            found.setdefault(key(name, block), []).append(part)
        return {
            group: Noise(
                tuple(map(sum, zip(*(one.signals for one in members)))),
                tuple(map(sum, zip(*(one.noises for one in members)))),
            )
            for group, members in found.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values: per block type the ratio, its standard error, and the tokens of a batch whose signal and noise are
        equal (the simple noise scale; infinite where no signal was seen)."""
        return {
            "blocks": {
                block.value: {
                    "signal_to_noise": of.ratio,
                    "error": of.error,
                    "noise_scale": self.tokens / of.ratio if of.ratio > 0 else math.inf,
                }
                for block, of in self.blocks().items()
            },
            "tokens": self.tokens,
        }


def measure_gradient_noise(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    block_map: BlockMap | None = None,
    predictions: Predictions = causal_lm,
) -> GradientNoise:
    """Estimates signal and noise of every block type's gradient, without changing anything of the model.

    As :func:`~blockwise_lr.measure.measure_sharpness`: nothing but the cross-entropy counts, dropout is off, and a training
    that measures in between goes on to the bit. Costs a forward and a backward pass a batch and holds one copy of the
    gradients. Under DDP and ZeRO 0 to 2 every rank calls it with batches of its own, and all return the same.

    Args:
        model: with whole parameters on this rank.
        batches: what ``predictions`` takes, independent of each other and of one size; an even number on each rank, as
            many on all. The more batches, the smaller the errors: with 64 a ratio of 0.1 is told from 0.
        block_map: from :func:`map_blocks`; made of the model otherwise.
        predictions: as for :func:`~blockwise_lr.measure.measure_sharpness`, but the targets count.

    Raises:
        BlockError: parameters that are sharded or sliced, an odd number of batches or none, or one without a target.
    """

    def measured() -> tuple[dict[Key, list[tuple[float, float]]], list[int]]:
        parts = BlockParts(model, map_blocks(model) if block_map is None else block_map)
        pairs = _Pairs(parts)
        gradients = Gradients(model, {name for name, _ in parts.named}, pairs.take)
        with as_it_was(model):
            tokens = [_backward(model, batch, predictions, gradients, pairs) for batch in batches]
        if not tokens or len(tokens) % 2:
            raise BlockError(
                f"there are {len(tokens)} batches, and they are measured in pairs; give an even number of them"
            )
        return pairs.found, tokens

    found, tokens = run_on_all_ranks(measured, "measuring the gradients' noise")
    answers = gathered((found, tokens))
    parts = {key: Noise(*map(tuple, zip(*(pair for theirs, _ in answers for pair in theirs[key])))) for key in found}
    counts = [count for _, theirs in answers for count in theirs]
    return GradientNoise(parts, sum(counts) / len(counts))


class _Pairs:
    """The gradients of the first batch of a pair, and the estimates from both once the second's are there."""

    def __init__(self, parts: BlockParts) -> None:
        self._parts = parts
        self._first: dict[str, torch.Tensor] = {}
        self._is_second = False
        self._sums: dict[Key, torch.Tensor] = {}
        self._keys = [(name, of.block) for name, _ in parts.named for of in parts.plans[name].classes]
        self.found: dict[Key, list[tuple[float, float]]] = {}

    def take(self, name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.float().contiguous()
        if not self._is_second:
            self._first[name] = gradient.clone()
            return
        first = self._first.pop(name, None)
        first = torch.zeros_like(gradient) if first is None else first
        self._add(name, first, gradient)

    def _add(self, name: str, first: torch.Tensor, second: torch.Tensor) -> None:
        views = zip(self._parts.views(name, first), self._parts.views(name, second))
        for (block, one), (_, other) in views:
            both = torch.stack([(one * other).sum(), (one - other).square().sum() / 2])
            key = name, block
            self._sums[key] = self._sums[key] + both if key in self._sums else both

    def done(self) -> None:
        """After a batch."""
        if self._is_second:
            for name, first in list(self._first.items()):  # of experts that only the first batch has reached
                self._add(name, first, torch.zeros_like(first))
            device = next(iter(self._sums.values())).device
            zero = torch.zeros(2, device=device)
            rows = torch.stack([self._sums.get(key, zero) for key in self._keys]).tolist()
            for key, (signal, noise) in zip(self._keys, rows):
                self.found.setdefault(key, []).append((signal, noise))
            self._first, self._sums = {}, {}
        self._is_second = not self._is_second


def _backward(model: torch.nn.Module, batch: Any, predictions: Predictions, gradients: Gradients, pairs: _Pairs) -> int:
    """Gives away the gradients of the mean loss of one batch; returns its predicted tokens."""
    with torch.enable_grad(), gradients.watching():
        logits, targets = predictions(model, batch)
        counted, p = predicted(logits, targets)
        gradient = torch.zeros_like(logits)
        gradient[counted] = logit_gradient(p, targets[counted], logits)
        gradients.backward(logits, gradient, keep=False)
    pairs.done()
    return len(p)
