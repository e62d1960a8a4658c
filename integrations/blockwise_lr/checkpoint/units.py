"""Adam-mini's second moment with one value per *output unit*: a row of the weight, or a column of a transposed one.

This form is independent of the sharding. For a DTensor parameter it is a DTensor, sharded as the parameter's rows are,
so that torch.distributed.checkpoint knows which part each rank holds and can reshard it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate

from ..blocks.layout import ParamLayout
from ..blocks.types import BlockError
from ..plan.dtensor import chunk_numel, local, shard_start, sharded_dimension
from ..plan.shards import even_boundaries
from ..plan.step_plan import INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, StepPlan
from .errors import CheckpointError


def local_part(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The part of a saved value that belongs to this rank's shard, as a plain tensor.

    Args:
        tensor: a parameter or flat shard.
        value: a DTensor, or a plain tensor with the elements of the whole parameter or of this rank's shard.
    """
    if isinstance(value, DTensor):
        if isinstance(tensor, DTensor) and value.placements != tensor.placements and value.shape == tensor.shape:
            value = value.redistribute(tensor.device_mesh, tensor.placements)
        return value.to_local()
    if isinstance(tensor, DTensor) and value.numel() == tensor.numel() and value.numel() != tensor.to_local().numel():
        start = shard_start(tensor, sharded_dimension(tensor, "the parameter"))
        return value.reshape(-1)[start : start + tensor.to_local().numel()].view(tensor.to_local().shape)
    return value


class UnitMoments:
    """Converts Adam-mini's second moment of one parameter between one value per output unit and per segment (slot).

    Args:
        tensor: the parameter; a DTensor or a plain tensor.
        layout: the layout of the whole parameter.
        plan: the plan of this rank's shard of it.

    Raises:
        BlockError: a transposed weight with fewer rows than ranks, of which some ranks would hold no segment.
    """

    def __init__(self, tensor: torch.Tensor, layout: ParamLayout, plan: StepPlan) -> None:
        self._shape = torch.Size((*layout.shape[: layout.batch_dims], layout.outputs))
        self._tensor = tensor
        if isinstance(tensor, DTensor) and _in_every_shard(layout):
            dimension = sharded_dimension(tensor, layout.name)
            if dimension is not None:
                _check_rows_on_every_rank(tensor, dimension, layout)
        self._placements = _unit_placements(tensor, layout) if isinstance(tensor, DTensor) else ()
        self._slot_of = torch.from_numpy(_slot_of_units(layout, plan)).to(local(tensor).device)
        units = torch.arange(len(self._slot_of), device=self._slot_of.device)
        self._unit_of = torch.zeros(plan.slots, dtype=torch.long, device=units.device).scatter_(0, self._slot_of, units)

    @property
    def numel(self) -> int:
        """Number of output units on this rank."""
        return len(self._slot_of)

    def placed(self, slots: torch.Tensor) -> torch.Tensor:
        """Values per segment (slots,) as values per output unit, with the parameter's placements."""
        units = slots[self._slot_of]
        if not isinstance(self._tensor, DTensor):
            return units.view(self._shape)
        rows = len(units) // max(math.prod(self._shape[1:]), 1)
        return DTensor.from_local(
            units.view(rows, *self._shape[1:]),
            self._tensor.device_mesh,
            self._placements,
            run_check=False,
            shape=self._shape,
            stride=torch.empty(self._shape, device="meta").stride(),
        )

    def slots(self, state: torch.Tensor) -> torch.Tensor:
        """The values per segment on this rank: (slots,), a copy."""
        return local(state).reshape(-1)[self._unit_of]

    def write(self, state: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes values per segment (slots,) to the state in place."""
        local(state).view(-1).copy_(slots[self._slot_of])


def _check_rows_on_every_rank(tensor: DTensor, dimension: int, layout: ParamLayout) -> None:
    ranks = tensor.device_mesh.size(dimension)
    if ranks > 1 and len(even_boundaries(tensor.numel(), chunk_numel(tensor, dimension))) + 1 < ranks:
        raise BlockError(
            f"{layout.name} is transposed and its {tensor.shape[0]} rows leave some of {ranks} ranks "
            f"without any, which Adam-mini does not support; shard it over fewer ranks"
        )


def _in_every_shard(layout: ParamLayout) -> bool:
    """Whether every shard of rows holds a part of all output units, as for the columns of a transposed weight."""
    return layout.transposed and not layout.batch_dims


def _unit_placements(tensor: DTensor, layout: ParamLayout) -> tuple[Placement, ...]:
    return tuple(Replicate() for _ in tensor.placements) if _in_every_shard(layout) else tensor.placements


def units_to_elements(tensor: torch.Tensor, layout: ParamLayout, value: torch.Tensor) -> torch.Tensor:
    """Expands saved values per output unit to the elements of this rank's shard: (elements,).

    Args:
        tensor: the parameter.
        layout: the layout it was saved with.
        value: (output units,) or (stacked matrices, output units); a DTensor, or the whole as a plain tensor.

    Raises:
        CheckpointError: ``value`` has another shape.
    """
    shape = (*layout.shape[: layout.batch_dims], layout.outputs)
    if tuple(value.shape) != shape:
        raise CheckpointError(
            f"the saved exp_avg_sq of {layout.name} is of shape {tuple(value.shape)} and should be of {shape}; "
            f"the checkpoint is damaged or of another model"
        )
    held = local(tensor)
    if isinstance(value, DTensor):
        if isinstance(tensor, DTensor) and value.placements != _unit_placements(tensor, layout):
            value = value.redistribute(tensor.device_mesh, _unit_placements(tensor, layout))
        value = value.to_local()
    elif isinstance(tensor, DTensor) and not _in_every_shard(layout):
        dimension = sharded_dimension(tensor, layout.name)
        row = max(tensor.numel() // max(tensor.shape[0], 1), 1)
        first = shard_start(tensor, dimension) // row
        value = value[first : first + held.shape[0]] if tensor.dim() else value
    if layout.transposed:
        matrices = value.reshape(-1, 1, layout.outputs)
        return matrices.expand(-1, held.numel() // max(value.numel(), 1), -1).reshape(-1)
    return value.reshape(-1, 1).expand(-1, layout.inputs).reshape(-1)


def _slot_of_units(layout: ParamLayout, plan: StepPlan) -> np.ndarray:
    """The slot of every output unit of a shard of whole rows, in memory order: int64, (units,)."""
    element, slot = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    width = layout.outputs if layout.transposed else layout.inputs
    for table in (plan.local.table, plan.shared.table):
        for row in table:
            # the segments of a transposed weight span all of its rows, so one row is enough
            runs = np.arange(1 if layout.transposed else row[OUTER])
            parts = np.arange(row[INNER] // row[UNIT])
            starts = row[OFFSET] + runs[:, None] * row[STRIDE] + parts * row[UNIT]
            slots = row[SLOT] + runs[:, None] * row[SLOT_STEP] + parts
            # one element per output unit of the segment
            step = np.arange(0, row[UNIT], 1 if layout.transposed else max(width, 1))
            element.append((starts[..., None] + step).ravel())
            slot.append(np.repeat(slots.ravel(), len(step)))
    elements, slots = np.concatenate(element), np.concatenate(slot)
    if layout.transposed:
        matrix = layout.inputs * layout.outputs
        units = elements // matrix * layout.outputs + elements % width if layout.batch_dims else elements % width
    else:
        units = elements // max(width, 1)
    count = (
        plan.numel // max(width, 1)
        if not layout.transposed
        else (plan.numel // (layout.inputs * layout.outputs) * layout.outputs if layout.batch_dims else layout.outputs)
    )
    found = np.zeros(count, np.int64)
    found[units] = slots
    return found
