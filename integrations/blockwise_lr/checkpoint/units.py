"""Adam-mini's second moment as one value per *output unit*, a row of the weight or a column of a transposed one.

States of a DTensor parameter are DTensors too, so that torch.distributed.checkpoint knows which part each rank holds and
can reshard it: output units are sharded as the parameter's rows are, and how segments lie in a shard does not show.
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
    """What this rank's shard of ``tensor`` holds of a value for the whole of it, or for the shard alone, as plain tensor.

    Args:
        tensor: a parameter or flat shard.
        value: a DTensor, or a plain tensor of the whole parameter or of this rank's shard, of any shape.
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
    """Adam-mini's second moment of one whole parameter: a value per output unit, and a slot per segment of the plan.

    Args:
        tensor: the parameter, a DTensor or not.
        layout: of the whole parameter.
        plan: of what this rank holds of it.

    Raises:
        BlockError: a transposed weight with fewer rows than ranks, of which a rank would hold no segment.
    """

    def __init__(self, tensor: torch.Tensor, layout: ParamLayout, plan: StepPlan) -> None:
        self._shape = torch.Size((*layout.shape[: layout.batch_dims], layout.outputs))
        self._tensor = tensor
        if isinstance(tensor, DTensor) and _in_every_shard(layout):
            dimension = sharded_dimension(tensor, layout.name)
            ranks = 1 if dimension is None else tensor.device_mesh.size(dimension)
            if ranks > 1 and len(even_boundaries(tensor.numel(), chunk_numel(tensor, dimension))) + 1 < ranks:
                raise BlockError(
                    f"{layout.name} is transposed and its {tensor.shape[0]} rows leave some of {ranks} ranks "
                    f"without any, which Adam-mini does not support; shard it over fewer ranks"
                )
        self._placements = _unit_placements(tensor, layout) if isinstance(tensor, DTensor) else ()
        self._slot_of = torch.from_numpy(_slot_of_units(layout, plan)).to(local(tensor).device)
        units = torch.arange(len(self._slot_of), device=self._slot_of.device)
        self._unit_of = torch.zeros(plan.slots, dtype=torch.long, device=units.device).scatter_(0, self._slot_of, units)

    @property
    def numel(self) -> int:
        """Values that this rank holds."""
        return len(self._slot_of)

    def placed(self, slots: torch.Tensor) -> torch.Tensor:
        """A value per segment (slots,) as a value per output unit, placed as the parameter is."""
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
        """The value of every segment that this rank holds: (slots,), a copy."""
        return local(state).reshape(-1)[self._unit_of]

    def write(self, state: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes the segments' values into the state."""
        local(state).view(-1).copy_(slots[self._slot_of])


def _in_every_shard(layout: ParamLayout) -> bool:
    """Whether a shard of rows holds a part of all output units: of a transposed weight, they are columns."""
    return layout.transposed and not layout.batch_dims


def _unit_placements(tensor: DTensor, layout: ParamLayout) -> tuple[Placement, ...]:
    return tuple(Replicate() for _ in tensor.placements) if _in_every_shard(layout) else tensor.placements


def units_to_elements(tensor: torch.Tensor, layout: ParamLayout, value: torch.Tensor) -> torch.Tensor:
    """A saved value per output unit of a parameter as a value per element of this rank's part: (elements,).

    Args:
        tensor: the parameter.
        layout: with which it was saved.
        value: (output units,) or (stacked matrices, output units): a DTensor, or whole and plain.

    Raises:
        CheckpointError: it has another shape.
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
    """The slot of every output unit that lies in a shard of whole rows, in memory's order: int64, (units,)."""
    element, slot = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    width = layout.outputs if layout.transposed else layout.inputs
    for table in (plan.local.table, plan.shared.table):
        for row in table:
            # the segments of a transposed weight run through all of its rows, so one row tells
            runs = np.arange(1 if layout.transposed else row[OUTER])
            parts = np.arange(row[INNER] // row[UNIT])
            starts = row[OFFSET] + runs[:, None] * row[STRIDE] + parts * row[UNIT]
            slots = row[SLOT] + runs[:, None] * row[SLOT_STEP] + parts
            # the elements of a unit at which it is looked at: all of a segment's, one per unit
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
