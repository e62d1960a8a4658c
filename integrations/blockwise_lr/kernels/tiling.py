"""Rectangles cut into tiles: what one thread of the C++ kernel works on at a time."""

from __future__ import annotations

import numpy as np

from ..plan.step_plan import INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, Rectangles

# a tile's columns after those of a rectangle's table
SEGMENT_NUMEL, SPREAD, COLUMNS = 8, 9, 10


def tiles(rectangles: Rectangles, size: int) -> np.ndarray:
    """Rectangles cut into tiles of about ``size`` elements, each of whole segments.

    Returns:
        int64, (tiles, 10): the columns of the rectangle table; SEGMENT_NUMEL; SPREAD, 1 where all runs share their
        slots and the tile holds some columns of all of them.
    """
    found = [_cut(row, int(numel), size) for row, numel in zip(rectangles.table, rectangles.segment_numel)]
    return np.ascontiguousarray(np.concatenate(found or [np.empty((0, COLUMNS), np.int64)]))


def _cut(row: np.ndarray, numel: int, size: int) -> np.ndarray:
    spread = int(row[SLOT_STEP] == 0 and row[OUTER] > 1 and numel > 0)
    outer, inner, unit = int(row[OUTER]), int(row[INNER]), int(row[UNIT])
    full = np.array([*row, numel, spread], dtype=np.int64)
    width = max((size // (min(outer, 256) if spread else 1)) // unit, 1) * unit
    if spread or inner >= size:
        starts = np.arange(0, inner, width)
        runs = 1 if spread else outer
        made = np.tile(full, (runs * len(starts), 1))
        run, start = np.repeat(np.arange(runs), len(starts)), np.tile(starts, runs)
        made[:, OFFSET] += run * row[STRIDE] + start
        made[:, SLOT] += run * row[SLOT_STEP] + start // unit
        made[:, INNER] = np.minimum(width, inner - start)
        made[:, OUTER] = outer if spread else 1
        return made
    runs = max(size // inner, 1)
    starts = np.arange(0, outer, runs)
    made = np.tile(full, (len(starts), 1))
    made[:, OFFSET] += starts * row[STRIDE]
    made[:, SLOT] += starts * row[SLOT_STEP]
    made[:, OUTER] = np.minimum(runs, outer - starts)
    return made
