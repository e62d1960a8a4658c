"""What foretells instability, block type by block type: Adam's second moments, gradients and weights, and the loss's ratio.

In the runs of arXiv 2108.06084 the norm and the maximum of Adam's variance go with spikes of the loss. Reduced over the ranks
that hold parts of the states, so that every element counts once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..blocks import BlockError, BlockType
from ..blocks.marks import marks_of
from ..checkpoint.moments import expand_segments
from ..optim.base import BlockwiseOptimizer
from ..optim.tensors import row
from ..plan.dtensor import local
from ..plan.step_plan import CLASS
from ..plan.views import runs_of

_VARIANCE = "exp_avg_sq"
_SUMS = ("elements", "variance", "gradients", "squares of gradients", "squares of weights")


@torch.no_grad()
def block_metrics(optimizer: BlockwiseOptimizer) -> dict[str, float]:
    """Figures of a training step, by ``name/block type``.

    - ``variance_l1``: the sum of Adam's second moments, without bias correction, and ``variance_max``: the largest; of
      Adam-mini a segment's moment counts for each of its elements. Not for rules without one.
    - ``gradient_norm``: of the gradients that the optimizer's tensors have now, so call it between backward and
      ``zero_grad``; where there are none (a ZeRO engine frees them in its step) it is left out.
    - ``weight_rms``: the root mean square of the weights.

    Collective where the optimizer steps shards (ZeRO, FSDP2): two small all-reduces over all ranks, and one transfer to the
    host. Call it every so many steps.

    Raises:
        BlockError: parameters that are sliced by tensor parallelism or spread over pipeline stages.
    """
    blocks = list(BlockType)
    tensors = _tensors(optimizer)
    device = next((local(tensor).device for tensor in tensors), torch.device("cpu"))
    sums = torch.zeros(len(_SUMS), len(blocks), dtype=torch.float64, device=device)
    largest = torch.zeros(len(blocks), dtype=torch.float64, device=device)
    _refuse_slices(optimizer)
    for tensor in tensors:
        if tensor.requires_grad or optimizer.shards is not None:
            _add(optimizer, tensor, blocks, sums, largest)
    _reduce(optimizer, blocks, sums, largest)
    found: dict[str, float] = {}
    figures, maxima = sums.cpu(), largest.cpu()
    has_variance = any(state.name == _VARIANCE for state in optimizer.rule.states)
    for number, block in enumerate(blocks):
        elements, variance, gradients, squares, weights = figures[:, number].tolist()
        if not elements:
            continue
        if has_variance:
            found[f"variance_l1/{block.value}"] = variance
            found[f"variance_max/{block.value}"] = maxima[number].item()
        if gradients:
            found[f"gradient_norm/{block.value}"] = squares**0.5
        found[f"weight_rms/{block.value}"] = (weights / elements) ** 0.5
    return found


def _tensors(optimizer: BlockwiseOptimizer) -> list[Any]:
    """What the optimizer steps. ZeRO-3 puts its shards into the param groups for the step alone."""
    return optimizer.all_tensors() if optimizer.shards is None else [flat for flat, _ in optimizer.shards.flats]


def _add(
    optimizer: BlockwiseOptimizer, tensor: Any, blocks: list[BlockType], sums: torch.Tensor, largest: torch.Tensor
) -> None:
    """Adds one of the optimizer's tensors to the sums of this rank."""
    plan, weights = optimizer.plan_of(tensor), row(local(tensor))
    gradients = None if tensor.grad is None else row(local(tensor.grad))
    variance = optimizer.state.get(tensor, {}).get(_VARIANCE)
    if variance is not None:
        is_segment = optimizer.rule.segment_state is not None and optimizer.rule.segment_state.name == _VARIANCE
        variance = expand_segments(variance, plan).to(weights.device) if is_segment else row(local(variance))
    for rectangle in (*plan.local.table, *plan.shared.table):
        number = blocks.index(plan.classes[int(rectangle[CLASS])].block)
        part = runs_of(weights, rectangle)
        sums[0, number] += part.numel()
        sums[4, number] += part.double().square().sum()
        if gradients is not None:
            sums[2, number] += part.numel()
            sums[3, number] += runs_of(gradients, rectangle).double().square().sum()
        if variance is not None and part.numel():
            part = runs_of(variance, rectangle)
            sums[1, number] += part.sum(dtype=torch.float64)
            largest[number] = torch.maximum(largest[number], part.max().double())


def _reduce(optimizer: BlockwiseOptimizer, blocks: list[BlockType], sums: torch.Tensor, largest: torch.Tensor) -> None:
    """Adds the ranks' parts, where this rank does not hold all of the model's elements."""
    if optimizer.shards is None or not dist.is_initialized():
        return
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    numel = optimizer.block_map.block_numel()
    copies = {float(sums[0, blocks.index(block)]) / count for block, count in numel.items() if count}
    times = next(iter(copies), 1.0)
    if len(copies) > 1 or times != round(times):
        raise BlockError(
            "the ranks hold some elements of the parameters more often than others, so that block_metrics cannot count each "
            "once; it is for DDP, ZeRO and FSDP2 without tensor parallelism"
        )
    sums /= times


def _refuse_slices(optimizer: BlockwiseOptimizer) -> None:
    if optimizer.saving.recorded_map is not None or any(
        marks_of(tensor).split_axis is not None for tensor in _tensors(optimizer)
    ):
        raise BlockError(
            "block_metrics counts every element once under DDP, ZeRO and FSDP2, and not yet where tensor-parallel ranks or "
            "pipeline stages hold parts of the model"
        )


class LossRatio:
    """A step's loss over the lowest before it: the paper's measure of instability.

    Attributes:
        steps: how many losses it was given.
        spikes: how many of them had a ratio above ``threshold``.
        largest: the largest ratio.
    """

    def __init__(self, threshold: float = 1.2) -> None:
        self.threshold = threshold
        self.lowest = float("inf")
        self.steps, self.spikes, self.largest = 0, 0, 0.0

    def add(self, loss: float) -> float:
        """The ratio of a step's loss; a loss that is no number is infinitely high. The first has none: 1."""
        loss = float(loss)
        ratio = loss / self.lowest if self.steps else 1.0
        ratio = ratio if ratio == ratio else float("inf")
        self.steps += 1
        self.spikes += ratio > self.threshold
        self.largest = max(self.largest, ratio)
        self.lowest = min(self.lowest, loss) if loss == loss else self.lowest
        return ratio

    @property
    def share(self) -> float:
        """The share of steps above the threshold."""
        return self.spikes / max(self.steps, 1)

    def state_dict(self) -> dict[str, float]:
        """All of it, as plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on where a state was saved."""
        vars(self).update(state)
