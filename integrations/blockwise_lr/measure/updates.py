"""What each block type's own update does to the loss: its slope and curvature along the move the optimizer made.

Sharpness says how curved the loss is for the raw weights; an optimizer like Adam has rescaled them. So this looks along the
move d_b of block type b in one optimizer step, from the predictions alone. With z the logits before the step and dz_b their
change when the parameters of b alone are moved, per predicted token with probabilities p and target y:

    slope_b         = mean(sum_c p_c dz_b,c - dz_b,y)                          (the gradient of the loss, times d_b)
    curvature_b,c   = mean(cov_p(dz_b, dz_c))                                  (d_b G d_c, G the Gauss-Newton matrix)
    multiplier_b    = -slope_b / curvature_b,b

Both are differences over the whole step, so for long steps the slope holds part of what is not quadratic. The multiplier is
what b's learning rate would have to be multiplied with for the quadratic model of the loss to be lowest along this move, all
other blocks standing still. It is short-sighted, for it knows one step: what is best over a whole run is higher in directions
without noise (arXiv 1803.02021), so compare blocks by it, and do not take its absolute size for a learning rate. Batches must
be other ones than the step was made with, or the noise that both share counts as progress. No backward pass is needed: a
forward pass per block type and batch, and one more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..blocks import BlockError, BlockMap, BlockType, map_blocks
from ..collective.agreement import gathered
from ..collective.errors import run_on_all_ranks
from .parts import IGNORED, BlockParts, Predictions, as_it_was, causal_lm

OfBatch = tuple[np.ndarray, np.ndarray, int]  # slopes, curvatures, predicted tokens


@dataclass(frozen=True)
class Updates:
    """What was measured, per batch (of all ranks) and block type.

    Attributes:
        blocks: the block types, in the order of the arrays' axes.
        slopes: (batches, blocks).
        curvatures: (batches, blocks, blocks); the diagonal is a block's own.
        numel: elements of each block type.
        moved: root mean square of each block type's move.
        weights: root mean square of its weights before.
        tokens: predicted tokens of all batches.
    """

    blocks: tuple[BlockType, ...]
    slopes: np.ndarray
    curvatures: np.ndarray
    numel: tuple[int, ...]
    moved: tuple[float, ...]
    weights: tuple[float, ...]
    tokens: int

    @property
    def own_curvatures(self) -> np.ndarray:
        """(batches, blocks): each block type's curvature along its own move."""
        return np.diagonal(self.curvatures, axis1=1, axis2=2)

    def multipliers(self) -> dict[BlockType, tuple[float, float]]:
        """Block type -> its multiplier, and the standard error over batches by the jackknife (nan for one batch).

        Negative where the move goes up the slope; infinite or nan for a block that did not move.
        """
        count = len(self.slopes)
        curvatures = self.own_curvatures
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = -self.slopes.sum(0) / curvatures.sum(0)
            without = -(self.slopes.sum(0) - self.slopes) / (curvatures.sum(0) - curvatures)
            spread = (without - without.mean(0)) ** 2
        errors = np.sqrt(spread.sum(0) * (count - 1) / count) if count > 1 else np.full(len(mean), math.nan)
        return {block: (float(t), float(error)) for block, t, error in zip(self.blocks, mean, errors)}

    def as_dict(self) -> dict[str, Any]:
        """Plain values per block type: parameters, slope, curvature, multiplier and its error, and root mean squares."""
        slopes, curvatures = self.slopes.mean(0), self.own_curvatures.mean(0)
        found = {}
        for number, (block, (multiplier, error)) in enumerate(self.multipliers().items()):
            found[block.value] = {
                "parameters": self.numel[number],
                "slope": float(slopes[number]),
                "curvature": float(curvatures[number]),
                "multiplier": multiplier,
                "error": error,
                "update_rms": self.moved[number],
                "weight_rms": self.weights[number],
            }
        return {"blocks": found, "tokens": self.tokens}


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters as they are now, for :func:`measure_updates` after the step."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def measure_updates(
    model: torch.nn.Module,
    before: Mapping[str, torch.Tensor],
    batches: Iterable[Any],
    *,
    block_map: BlockMap | None = None,
    predictions: Predictions = causal_lm,
) -> Updates:
    """Measures, for each block type, the slope and the curvature of the loss along the move the model has just made.

    Parameters, gradients, modes and random number generators are as before afterwards, to the bit. Under DDP and ZeRO 0 to
    2 every rank calls this with batches of its own, and all return the same. Holds two more copies of the parameters, and
    per block type the logits of a batch in float32.

    Args:
        model: after the step; with whole float32 parameters on this rank.
        before: from :func:`snapshot`, before the step.
        batches: what ``predictions`` takes, of data the step has not seen; as many on every rank.
        block_map: from :func:`map_blocks`; made of the model otherwise.
        predictions: (model, batch) -> (predictions, vocabulary) logits, and targets (predictions,), -100 where none counts.

    Raises:
        BlockError: parameters that are sharded, sliced or not float32 or float64, a snapshot of another model, no batch,
            or no target in one.
    """

    def measured() -> tuple[BlockParts, dict[str, torch.Tensor], list[OfBatch]]:
        parts = BlockParts(model, map_blocks(model) if block_map is None else block_map)
        _check(parts, before)
        after = snapshot(model)
        try:
            with as_it_was(model), torch.no_grad():
                found = [_of_batch(model, batch, predictions, parts, before, after) for batch in batches]
        finally:
            _place(parts, after)
        if not found:
            raise BlockError("there is no batch to measure on; give at least one on every rank")
        return parts, after, found

    parts, after, found = run_on_all_ranks(measured, "measuring the updates")
    return _over_ranks(found, parts, before, after)


def _check(parts: BlockParts, before: Mapping[str, torch.Tensor]) -> None:
    for name, p in parts.named:
        if p.dtype not in (torch.float32, torch.float64):
            raise BlockError(
                f"{name} is {p.dtype}, whose rounding hides a step; measure a float32 model (under autocast if you like)"
            )
        if name not in before or before[name].shape != p.shape:
            raise BlockError(
                f"the snapshot has no {name} of shape {tuple(p.shape)}; take it of this model, before the step"
            )


@torch.no_grad()
def _place(parts: BlockParts, values: Mapping[str, torch.Tensor], block: BlockType | None = None) -> None:
    """Puts values into the parameters; only those of a block type, where one is named."""
    for name, p in parts.named:
        if block is None:
            p.copy_(values[name])
            continue
        source, target = values[name].contiguous(), p.detach().contiguous()
        for (of, value), (_, place) in zip(parts.views(name, source), parts.views(name, target)):
            if of is block:
                place.copy_(value)
        if not p.is_contiguous():
            p.copy_(target)


def _of_batch(
    model: torch.nn.Module,
    batch: Any,
    predictions: Predictions,
    parts: BlockParts,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> OfBatch:
    """Slopes (blocks,), curvatures (blocks, blocks) and predicted tokens of one batch."""
    _place(parts, before)
    logits, targets = predictions(model, batch)
    counted = targets != IGNORED
    still, targets = logits[counted].double(), targets[counted, None]
    if not len(still):
        raise BlockError("a batch predicts no token: all of its labels are -100; give batches with some")
    p = still.softmax(-1)
    slopes, centered = [], []
    for block in parts.blocks:
        _place(parts, after, block)
        change = predictions(model, batch)[0][counted].double() - still
        _place(parts, before, block)
        mean = (p * change).sum(-1, keepdim=True)
        slopes.append((mean - change.gather(1, targets)).mean())
        centered.append((p.sqrt() * (change - mean)).flatten())
    rows = torch.stack(centered)
    return torch.stack(slopes).cpu().numpy(), (rows @ rows.T / len(still)).cpu().numpy(), len(still)


def _over_ranks(
    measured: Sequence[OfBatch],
    parts: BlockParts,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> Updates:
    """All ranks' batches together. Collective."""
    everything = [one for answer in gathered(list(measured)) for one in answer]
    numel = dict.fromkeys(parts.blocks, 0)
    moved, weights = dict.fromkeys(parts.blocks, 0.0), dict.fromkeys(parts.blocks, 0.0)
    for name, _ in parts.named:
        old, new = before[name].contiguous(), after[name].contiguous()
        for (block, start), (_, end) in zip(parts.views(name, old), parts.views(name, new)):
            numel[block] += start.numel()
            moved[block] += float((end - start).double().square().sum())
            weights[block] += float(start.double().square().sum())
    return Updates(
        tuple(parts.blocks),
        np.stack([slopes for slopes, _, _ in everything]),
        np.stack([curvatures for _, curvatures, _ in everything]),
        tuple(numel.values()),
        tuple(math.sqrt(moved[block] / numel[block]) for block in numel),
        tuple(math.sqrt(weights[block] / numel[block]) for block in numel),
        sum(count for _, _, count in everything),
    )
