"""What foretells instability, block type by block type: Adam's second moments, gradients, weights and updates.

In the runs of arXiv 2108.06084 the norm and the maximum of Adam's variance go with spikes of the loss. Reduced over the ranks
that hold parts of the states, so that every element counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..blocks import BlockError, BlockType
from ..blocks.marks import marks_of
from ..checkpoint.moments import expand_segments
from ..optim.base import BlockwiseOptimizer
from ..optim.clipping import device_of
from ..optim.tensors import row
from ..plan.dtensor import local
from ..plan.step_plan import CLASS
from ..plan.views import runs_of

_BLOCKS = list(BlockType)
_VARIANCE = "exp_avg_sq"
# what is added up per block type, one row each; of gradients and updates also how many elements have one
_ELEMENTS, _L1, _WEIGHTS, _WITH_GRADIENT, _GRADIENTS, _WITH_UPDATE, _UPDATES = range(7)


def block_metrics(*optimizers: BlockwiseOptimizer) -> dict[str, float]:
    """Figures of a training step, by ``name/block type``.

    - ``variance_l1``: the sum of Adam's second moments, without bias correction, and ``variance_max``: the largest; of
      Adam-mini a segment's moment counts for each of its elements. Not for rules without one.
    - ``gradient_norm``: of the gradients that the optimizer's tensors have now, so call it between backward and
      ``zero_grad``; where there are none (a ZeRO engine frees them in its step) it is left out.
    - ``weight_rms``: the root mean square of the weights.

    :class:`~blockwise_lr.measure.BlockMonitor` has the gradients in every door, and the size of updates.

    Collective where the optimizer steps shards (ZeRO, FSDP2, Megatron): two small all-reduces, and one transfer to the
    host. Call it every so many steps.

    Args:
        optimizers: of one model: one, or all that Megatron chains.

    Raises:
        BlockError: parameters that DeepSpeed slices by tensor parallelism or spreads over pipeline stages.
    """
    every = [BlockSums(optimizer) for optimizer in optimizers]
    for sums in every:
        for tensor in sums.tensors():
            if tensor.grad is not None:
                sums.add_gradient(tensor, tensor.grad)
        sums.add_states()
    return figures(every)


class BlockSums:
    """Sums over the elements of an optimizer's tensors, by block type.

    Raises:
        BlockError: as :func:`block_metrics`.
    """

    def __init__(self, optimizer: BlockwiseOptimizer) -> None:
        self.optimizer = optimizer
        self._refuse_slices()
        shards = optimizer.shards
        # an adapter that says what counts says over which ranks, one group for all of an optimizer's tensors
        self._counted, self._group = None, None
        if shards is not None and shards.counted:
            self._counted = {id(flat) for (flat, _), counts in zip(shards.flats, shards.counted) if counts}
            self._group = next(iter(shards.groups), None)
        default = device_of([self._group] if dist.is_initialized() and shards is not None else [])
        device = next((local(tensor).device for tensor in self.tensors()), default)
        self._sums = torch.zeros(_UPDATES + 1, len(_BLOCKS), dtype=torch.float64, device=device)
        self._largest = torch.zeros(len(_BLOCKS), dtype=torch.float64, device=device)

    def tensors(self) -> Iterable[Any]:
        """What the optimizer steps. ZeRO-3 puts its shards into the param groups for the step alone."""
        if self.optimizer.shards is None:
            return [tensor for tensor in self.optimizer.all_tensors() if tensor.requires_grad]
        return [flat for flat, _ in self.optimizer.shards.flats]

    @torch.no_grad()
    def add_gradient(self, tensor: Any, gradient: Any) -> None:
        """Adds a tensor's gradient."""
        self._add_squares(tensor, row(local(gradient)), _WITH_GRADIENT, _GRADIENTS)

    @torch.no_grad()
    def add_update(self, tensor: Any, update: torch.Tensor) -> None:
        """Adds what a step has changed in a tensor, as one row."""
        self._add_squares(tensor, update, _WITH_UPDATE, _UPDATES)

    @torch.no_grad()
    def add_states(self) -> None:
        """Adds all tensors' weights and second moments."""
        for tensor in self.tensors():
            variance = self._variance(tensor)
            self._add_squares(tensor, row(local(tensor)), _ELEMENTS, _WEIGHTS)
            for number, part in self._parts(tensor, variance) if variance is not None else ():
                self._sums[_L1, number] += part.sum(dtype=torch.float64)
                if part.numel():
                    self._largest[number] = torch.maximum(self._largest[number], part.max().double())

    def reduced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums and maxima of all ranks, on the host. Collective where the optimizer steps shards."""
        sums, largest = self._sums, self._largest
        if self.optimizer.shards is not None and dist.is_initialized():
            dist.all_reduce(sums, group=self._group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
            if self._counted is None:
                sums /= self._copies(sums)
        return sums.cpu(), largest.cpu()

    def _add_squares(self, tensor: Any, values: torch.Tensor, count: int, squares: int) -> None:
        for number, part in self._parts(tensor, values):
            self._sums[count, number] += part.numel()
            self._sums[squares, number] += part.double().square().sum()

    def _parts(self, tensor: Any, values: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
        """The parts of a row with a tensor's elements, each with its block type's number; none of a copy's."""
        if self._counted is not None and id(tensor) not in self._counted:
            return
        plan = self.optimizer.plan_of(tensor)
        for rectangle in (*plan.local.table, *plan.shared.table):
            yield _BLOCKS.index(plan.classes[int(rectangle[CLASS])].block), runs_of(values, rectangle)

    def _variance(self, tensor: Any) -> torch.Tensor | None:
        found, segment_state = self.optimizer.state.get(tensor, {}).get(_VARIANCE), self.optimizer.rule.segment_state
        if found is None:
            return None
        if segment_state is not None and segment_state.name == _VARIANCE:
            return expand_segments(found, self.optimizer.plan_of(tensor)).to(local(tensor).device)
        return row(local(found))

    def _copies(self, sums: torch.Tensor) -> float:
        """How often the ranks hold every element."""
        numel = self.optimizer.block_map.block_numel()
        copies = {float(sums[_ELEMENTS, _BLOCKS.index(block)]) / count for block, count in numel.items() if count}
        times = next(iter(copies), 1.0)
        if len(copies) > 1 or times != round(times):
            raise BlockError(
                "the ranks hold some elements of the parameters more often than others, so that block_metrics cannot count "
                "each once; it is for DDP, ZeRO, FSDP2 and Megatron, without DeepSpeed's expert or tensor parallelism"
            )
        return times

    def _refuse_slices(self) -> None:
        if self.optimizer.shards is not None and self.optimizer.shards.counted:
            return
        if self.optimizer.saving.recorded_map is not None or any(
            marks_of(tensor).split_axis is not None for tensor in self.tensors()
        ):
            raise BlockError(
                "block_metrics counts every element once under DDP, ZeRO, FSDP2 and Megatron, and not yet where DeepSpeed's "
                "tensor-parallel ranks or pipeline stages hold parts of the model"
            )


def figures(every: Sequence[BlockSums]) -> dict[str, float]:
    """What :func:`block_metrics` returns, of the sums of all of a model's optimizers. Collective as they are."""
    reduced = [sums.reduced() for sums in every]
    total = torch.stack([sums for sums, _ in reduced]).sum(0)
    largest = torch.stack([maxima for _, maxima in reduced]).amax(0)
    has_variance = any(state.name == _VARIANCE for sums in every for state in sums.optimizer.rule.states)
    found: dict[str, float] = {}
    for number, block in enumerate(_BLOCKS):
        of = total[:, number].tolist()
        if not of[_ELEMENTS]:
            continue
        weight_rms = (of[_WEIGHTS] / of[_ELEMENTS]) ** 0.5
        if has_variance:
            found[f"variance_l1/{block.value}"] = of[_L1]
            found[f"variance_max/{block.value}"] = largest[number].item()
        if of[_WITH_GRADIENT]:
            found[f"gradient_norm/{block.value}"] = of[_GRADIENTS] ** 0.5
        found[f"weight_rms/{block.value}"] = weight_rms
        if of[_WITH_UPDATE]:
            update_rms = (of[_UPDATES] / of[_WITH_UPDATE]) ** 0.5
            found[f"update_rms/{block.value}"] = update_rms
            found[f"update_to_weight/{block.value}"] = update_rms / weight_rms if weight_rms else float("inf")
    return found
