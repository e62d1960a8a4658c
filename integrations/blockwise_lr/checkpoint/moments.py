"""Conversion of Adam-mini's second moment between one value per segment and one value per element.

Checkpoint formats and tools only support optimizer states of the parameter's shape. All elements of a segment share one
value, so expanding it and taking it back is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..plan.step_plan import SLOT_STEP, Rectangles, StepPlan, slot_numel
from ..plan.views import segments_of, slots_of


def expand_segments(moments: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """Expands values per segment to values per element.

    Args:
        moments: (plan.slots,), on any device.
        plan: Adam-mini's plan of the flat tensor.

    Returns:
        (plan.numel,), float32, on the CPU; 0 in padding.
    """
    moments = moments.float().cpu()
    elements = torch.zeros(plan.numel, dtype=torch.float32)
    for row in _rows(plan):
        segments_of(elements, row).copy_(slots_of(moments, row).unsqueeze(-1))
    return elements


def take_segments(elements: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """The first element of every segment in this shard: the bitwise inverse of :func:`expand_segments`.

    Args:
        elements: (plan.numel,), all elements of a segment equal.

    Returns:
        (plan.slots,), float32, on the elements' device.
    """
    moments = torch.zeros(plan.slots, dtype=torch.float32, device=elements.device)
    for row in _rows(plan):
        first = segments_of(elements, row)[..., 0]
        slots_of(moments, row).copy_(first[0] if row[SLOT_STEP] == 0 else first)
    return moments


def segment_sums(elements: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """The sum of each segment's elements in this shard: (plan.slots,), float64, on the elements' device."""
    sums = torch.zeros(plan.slots, dtype=torch.float64, device=elements.device)
    for row in _rows(plan):
        view = segments_of(elements, row)
        slots_of(sums, row).add_(
            view.sum((0, 2), dtype=torch.float64) if row[SLOT_STEP] == 0 else view.sum(2, dtype=torch.float64)
        )
    return sums


def segment_means(sums: torch.Tensor, plan: StepPlan, rectangles: Rectangles) -> torch.Tensor:
    """Divides sums over whole segments by their numbers of elements.

    Args:
        sums: (plan.slots,); for segments that span shards, already reduced over the ranks.
        plan: the plan of the flat tensor.
        rectangles: ``plan.local`` or ``plan.shared``.

    Returns:
        (plan.slots,), float32; 0 for other segments.
    """
    found = torch.zeros(plan.slots, dtype=torch.float64, device=sums.device)
    slots, numel = (torch.from_numpy(array).to(sums.device) for array in slot_numel(rectangles))
    found[slots] = sums[slots].double() / numel
    return found.float()


def _rows(plan: StepPlan) -> Iterator[np.ndarray]:
    for rectangles in (plan.local, plan.shared):
        yield from rectangles.table
