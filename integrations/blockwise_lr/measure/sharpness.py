"""Sharpness per block type: the trace of the Gauss-Newton matrix's block over the block's size (arXiv 2502.19002, section 4).

Estimated as in Sophia (Gauss-Newton-Bartlett, arXiv 2305.14342): labels are drawn from the model's own predictions, and the
squared gradient of the mean loss over N predicted tokens, times N, has the trace as its expectation. Nothing is clipped.
A single draw is noisy, most of all for the few elements of the norms, so every number comes with its standard error, and an
order that the errors do not separate is not stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks import BlockError, BlockMap, BlockType, map_blocks
from ..collective.agreement import gathered
from ..collective.errors import run_on_all_ranks
from .gradients import Gradients
from .labels import drawn_labels, logit_gradient, predicted, seed_of
from .parts import BlockParts, Predictions, as_it_was, causal_lm


@dataclass(frozen=True)
class Estimate:
    """A block's sharpness.

    Attributes:
        numel: elements of the block.
        traces: the estimated trace of each draw.
    """

    numel: int
    traces: tuple[float, ...]

    @property
    def sharpness(self) -> float:
        """Mean over draws of the trace, over the block's elements."""
        return sum(self.traces) / len(self.traces) / self.numel

    @property
    def error(self) -> float:
        """Standard error of the sharpness; nan for a single draw."""
        count = len(self.traces)
        if count < 2:
            return math.nan
        mean = sum(self.traces) / count
        return math.sqrt(sum((trace - mean) ** 2 for trace in self.traces) / (count - 1) / count) / self.numel


@dataclass(frozen=True)
class Sharpness:
    """What was measured.

    Attributes:
        parts: (parameter, block type) -> its estimate; a fused weight has several.
        tokens: predicted tokens of all batches, each counted once however many draws were made for it.
    """

    parts: Mapping[tuple[str, BlockType], Estimate]
    tokens: int

    def blocks(self) -> dict[BlockType, Estimate]:
        """Per block type, over the whole model."""
        return self.grouped(lambda _, block: block)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: per block type its elements, sharpness and standard error; the order; the tokens."""
        blocks = {
            block.value: {"parameters": of.numel, "sharpness": of.sharpness, "error": of.error}
            for block, of in self.blocks().items()
        }
        return {"blocks": blocks, "order": [[b.value for b in level] for level in self.order()], "tokens": self.tokens}

    def grouped(self, key: Callable[[str, BlockType], Any]) -> dict[Any, Estimate]:
        """Estimates added up by a key of parameter and block type, as layer and block type."""
        found: dict[Any, Estimate] = {}
        for (name, block), part in self.parts.items():
            group = key(name, block)
            if group in found:
                traces = tuple(a + b for a, b in zip(found[group].traces, part.traces, strict=True))
                part = Estimate(found[group].numel + part.numel, traces)
            found[group] = part
        return found

    def order(self, errors: float = 2.0) -> list[list[BlockType]]:
        """Block types from the flattest to the sharpest, together in a list where the errors do not separate neighbours.

        Args:
            errors: how many standard errors of their difference must lie between two block types.
        """
        found: list[list[BlockType]] = []
        ranked = sorted(self.blocks().items(), key=lambda item: item[1].sharpness)
        for (_, below), (block, estimate) in zip([(None, None), *ranked], ranked):
            apart = below is None or (
                estimate.sharpness - below.sharpness > errors * math.hypot(estimate.error, below.error)
            )
            if apart:
                found.append([block])
            else:
                found[-1].append(block)
        return found


def measure_sharpness(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    block_map: BlockMap | None = None,
    draws: int = 8,
    seed: int = 0,
    predictions: Predictions = causal_lm,
) -> Sharpness:
    """Estimates the sharpness of every block type of a model, without changing anything of it.

    Gradients (``.grad``), modes, and the states of all random number generators are as before, so a training that
    measures in between goes on to the bit. Dropout is off meanwhile, and losses that a model adds to the cross-entropy
    (balance of experts, z-loss) are not part of it. Costs a forward pass a batch and a backward pass a draw, under ZeRO-3 a
    forward pass a draw.

    Under DDP, FSDP2 and ZeRO 0 to 3 (``engine.module``) every rank calls this with batches of its own, and all return the
    estimate over all of them. Gradients are taken one parameter at a time, so no rank holds those of a whole model.

    Args:
        model: with whole parameters on this rank, or sharded by FSDP2 or ZeRO-3, which gather them for each use.
        batches: what ``predictions`` takes; as many on every rank. Of many small batches and of few large ones with as many
            tokens, the former cost less memory and the same time.
        block_map: from :func:`map_blocks`; made of the model otherwise.
        draws: of labels, for each batch.
        seed: of the draws; ranks draw differently.
        predictions: (model, batch) -> (predictions, vocabulary) logits, and targets (predictions,), of which only those
            of -100 are used: they do not count.

    Raises:
        BlockError: parameters that tensor parallelism slices, no batch, or no predicted token in one.
    """

    def measured() -> tuple[BlockParts, dict[tuple[str, BlockType], list[float]], int]:
        parts = BlockParts(model, map_blocks(model) if block_map is None else block_map, gathered_in_use=True)
        if draws < 1:
            raise BlockError(f"draws is {draws}; give at least 1, and 8 or more for errors that mean something")
        traces: dict[tuple[str, BlockType], list[float]] = {}
        tokens = 0
        with as_it_was(model):
            for number, batch in enumerate(batches):
                tokens += _measure(model, batch, predictions, parts, traces, draws, seed_of(seed, _rank(), number))
        if not tokens:
            raise BlockError("there is no batch to measure on; give at least one on every rank")
        return parts, traces, tokens

    parts, traces, tokens = run_on_all_ranks(measured, "measuring the sharpness")
    return _over_ranks(traces, tokens, parts)


class Squares:
    """Sums of squares of gradients by parameter and block type, on the device until they are asked for."""

    def __init__(self, parts: BlockParts) -> None:
        self._parts = parts
        self.keys = [(name, of.block) for name, _ in parts.named for of in parts.plans[name].classes]
        self._found: dict[tuple[str, BlockType], torch.Tensor] = {}

    def take(self, name: str, gradient: torch.Tensor) -> None:
        for block, part in self._parts.views(name, gradient.contiguous()):
            square = part.float().square().sum()
            key = name, block
            self._found[key] = self._found[key] + square if key in self._found else square

    def drawn(self) -> list[float]:
        """Those of one backward pass, by key."""
        found, self._found = self._found, {}
        device = next(iter(found.values())).device if found else torch.device("cpu")
        zero = torch.zeros((), device=device)
        return torch.stack([found.get(key, zero).to(device) for key in self.keys]).tolist()


def _measure(
    model: torch.nn.Module,
    batch: Any,
    predictions: Predictions,
    parts: BlockParts,
    traces: dict[tuple[str, BlockType], list[float]],
    draws: int,
    seed: int,
) -> int:
    """Adds the draws of one batch to ``traces``; returns how many tokens it predicts."""
    squares = Squares(parts)
    gradients = Gradients(model, {name for name, _ in parts.named}, squares.take)
    with torch.enable_grad(), gradients.watching():
        logits, targets = predictions(model, batch)
        counted, p = predicted(logits, targets)
        for draw, labels in enumerate(drawn_labels(p, draws, seed)):
            if draw and gradients.once:
                logits, _ = predictions(model, batch)
            gradient = torch.zeros_like(logits)
            gradient[counted] = logit_gradient(p, labels, logits)
            gradients.backward(logits, gradient, keep=draw + 1 < draws and not gradients.once)
            for key, square in zip(squares.keys, squares.drawn()):
                traces.setdefault(key, []).append(len(p) * square)
    return len(p)


def _over_ranks(traces: Mapping[tuple[str, BlockType], list[float]], tokens: int, parts: BlockParts) -> Sharpness:
    """All ranks' draws together. Collective."""
    answers = gathered((dict(traces), tokens))
    estimates = {
        key: Estimate(parts.numel(*key), tuple(x for found, _ in answers for x in found[key])) for key in traces
    }
    return Sharpness(estimates, sum(count for _, count in answers))


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
