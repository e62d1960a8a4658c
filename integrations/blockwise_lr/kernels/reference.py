"""The kernel in plain torch: always there, on every device, and what the others are tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..plan.step_plan import CLASS, INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, Rectangles
from ..plan.views import runs_of, segments_of, slots_of
from ..rules.base import UpdateRule
from .interface import Work

# Elements worked on at a time: temporaries of an optimizer step stay this small however large the shard.
TILE = 1 << 20


class ReferenceKernel:
    """Tiles of at most TILE elements (or one segment, where that is larger); at most three tile-sized float32
    temporaries live at a time."""

    name = "reference"

    def step(self, rule: UpdateRule, works: Sequence[Work], *, presummed: bool = False) -> None:
        for work in works:
            if work.moments is None:
                _step_elements(rule, work)
            elif presummed:
                for tile in _tiles(work.plan.shared):
                    _segment_tile(rule, work, work.moments, tile)
            else:
                _step_segments(rule, work, work.moments)

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        for tile in _tiles(rectangles):
            slots_of(sums, tile).add_(_segment_sums(grad, tile))


def _step_elements(rule: UpdateRule, work: Work) -> None:
    values = work.values
    for tile in _tiles(work.plan.local):
        p, kept = runs_of(work.param, tile), [runs_of(state, tile) for state in work.states]
        number = int(tile[CLASS])
        rule.update(
            p, runs_of(work.grad, tile).to(p.dtype), kept, values.lrs[number], values.decays[number], values.scalars
        )
        _copy_out(work.out, work.param, tile)


def _step_segments(rule: UpdateRule, work: Work, moments: torch.Tensor) -> None:
    rectangles, grad, scalars = work.plan.local, work.grad, work.values.scalars
    for row, numel in zip(rectangles.table, rectangles.segment_numel):
        spread = row[SLOT_STEP] == 0 and row[OUTER] > 1  # segments go through all runs: sum them before any update
        if spread:
            rule.next_moment(slots_of(moments, row), _spread_sums(grad, row) / numel, scalars)
        for tile in _split(row):
            if not spread:
                rule.next_moment(slots_of(moments, tile), _segment_sums(grad, tile) / numel, scalars)
            _segment_tile(rule, work, moments, tile)


def _segment_tile(rule: UpdateRule, work: Work, moments: torch.Tensor, tile: np.ndarray) -> None:
    """The update of a tile, whose segment states are those of this step already."""
    p, kept = segments_of(work.param, tile), [segments_of(state, tile) for state in work.states]
    number, values = int(tile[CLASS]), work.values
    rule.update(
        p,
        segments_of(work.grad, tile).to(p.dtype),
        [*kept, slots_of(moments, tile).unsqueeze(-1)],
        values.lrs[number],
        values.decays[number],
        values.scalars,
    )
    _copy_out(work.out, work.param, tile)


def _copy_out(out: torch.Tensor | None, param: torch.Tensor, row: np.ndarray) -> None:
    if out is not None:
        runs_of(out, row).copy_(runs_of(param, row))


def _spread_sums(grad: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    sums = torch.zeros(int(row[INNER] // row[UNIT]), dtype=torch.float32, device=grad.device)
    for tile in _split(row):
        slots_of(sums, tile, int(row[SLOT])).add_(_segment_sums(grad, tile))
    return sums


def _segment_sums(grad: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    squares = segments_of(grad, row).float().square()
    return squares.sum((0, 2)) if row[SLOT_STEP] == 0 else squares.sum(2)


def _tiles(rectangles: Rectangles) -> Iterator[np.ndarray]:
    for row in rectangles.table:
        yield from _split(row)


def _split(row: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts a rectangle into rectangles of at most TILE elements, whole segments each."""
    outer, inner = int(row[OUTER]), int(row[INNER])
    unit = max(1, int(row[UNIT]))
    if outer * inner <= TILE:
        yield row
    elif inner >= TILE or outer == 1:
        width = max(TILE // unit, 1) * unit
        for run in range(outer):
            for start in range(0, inner, width):
                tile = row.copy()
                tile[OFFSET] += run * row[STRIDE] + start
                tile[SLOT] += run * row[SLOT_STEP] + start // unit
                tile[OUTER], tile[STRIDE], tile[INNER] = 1, 0, min(width, inner - start)
                yield tile
    else:
        runs = max(TILE // inner, 1)
        for start in range(0, outer, runs):
            tile = row.copy()
            tile[OFFSET] += start * row[STRIDE]
            tile[SLOT] += start * row[SLOT_STEP]
            tile[OUTER] = min(runs, outer - start)
            yield tile
