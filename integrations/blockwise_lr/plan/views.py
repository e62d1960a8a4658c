"""The rectangles of a plan as views of flat tensors."""

from __future__ import annotations

import numpy as np
import torch

from .step_plan import INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT


def runs_of(tensor: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    """The rectangle as a view (outer, inner)."""
    return tensor.as_strided(
        (int(row[OUTER]), int(row[INNER])), (int(row[STRIDE]), 1), tensor.storage_offset() + int(row[OFFSET])
    )


def segments_of(tensor: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    """The rectangle as a view (outer, segments per run, unit)."""
    return runs_of(tensor, row).unflatten(1, (-1, int(row[UNIT])))


def slots_of(moments: torch.Tensor, row: np.ndarray, base: int = 0) -> torch.Tensor:
    """The rectangle's slots as a view: (outer, segments per run), or (segments per run,) if all runs share them."""
    count = int(row[INNER] // row[UNIT])
    offset = moments.storage_offset() + int(row[SLOT]) - base
    if row[SLOT_STEP] == 0:
        return moments.as_strided((count,), (1,), offset)
    return moments.as_strided((int(row[OUTER]), count), (int(row[SLOT_STEP]), 1), offset)
