"""The kernel in plain torch: always there, on every device, and what the others are tested against."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..plan.step_plan import CLASS, INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, Rectangles, StepPlan
from ..plan.views import runs_of, segments_of, slots_of
from .interface import StepValues

# Elements worked on at a time: temporaries of an optimizer step stay this small however large the shard.
TILE = 1 << 20


class ReferenceKernel:
    """Tiles of at most TILE elements (or one segment, where that is larger); at most three tile-sized float32
    temporaries live at a time."""

    name = "reference"

    def adamw(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        for row in _tiles(plan.local, 1):
            p, g, m, v = (runs_of(t, row) for t in (param, grad, exp_avg, exp_avg_sq))
            adamw_update(p, g.to(p.dtype), m, v, values, int(row[CLASS]))
            _copy_out(out, param, row)

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        for row in _tiles(rectangles, 1):
            slots_of(sums, row).add_(_segment_sums(grad, row))

    def adam_mini(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        rectangles = plan.local
        for row, numel in zip(rectangles.table, rectangles.segment_numel):
            spread = row[SLOT_STEP] == 0 and row[OUTER] > 1  # segments go through all runs: sum them before any update
            if spread:
                _second_moment(slots_of(exp_avg_sq, row), _spread_sums(grad, row), numel, values)
            for tile in _split(row, 1):
                if not spread:
                    _second_moment(slots_of(exp_avg_sq, tile), _segment_sums(grad, tile), numel, values)
                _mini_tile(param, grad, exp_avg, exp_avg_sq, tile, values)
                _copy_out(out, param, tile)

    def adam_mini_presummed(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        for tile in _tiles(plan.shared, 1):
            _mini_tile(param, grad, exp_avg, exp_avg_sq, tile, values)
            _copy_out(out, param, tile)


def adamw_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    values: StepValues,
    number: int,
) -> None:
    """AdamW on tensors of equal shape and one class, in place; the operations of torch.optim.AdamW in its order:

    p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2;
    p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    """
    lr = values.lrs[number]
    param.mul_(1 - lr * values.decays[number])
    exp_avg.lerp_(grad, 1 - values.beta1)
    exp_avg_sq.mul_(values.beta2).addcmul_(grad, grad, value=1 - values.beta2)
    denominator = (exp_avg_sq.sqrt() / values.correction2_sqrt).add_(values.eps)
    param.addcdiv_(exp_avg, denominator, value=-(lr / values.correction1))


def _second_moment(moment: torch.Tensor, sums: torch.Tensor, numel: float, values: StepValues) -> None:
    """v <- b2 v + (1 - b2) mean(g^2), one value per segment (Adam-mini, arXiv 2406.16793)."""
    moment.mul_(values.beta2).add_(sums / numel, alpha=1 - values.beta2)


def _mini_tile(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    row: np.ndarray,
    values: StepValues,
) -> None:
    """Parameters and first moments of a tile, its second moments being those of this step already."""
    p, g, m = (segments_of(t, row) for t in (param, grad, exp_avg))
    lr = values.lrs[row[CLASS]]
    p.mul_(1 - lr * values.decays[row[CLASS]])
    m.lerp_(g.to(m.dtype), 1 - values.beta1)
    denominator = (slots_of(exp_avg_sq, row).sqrt() / values.correction2_sqrt).add_(values.eps)
    p.addcdiv_(m, denominator.to(p.dtype).unsqueeze(-1), value=-(lr / values.correction1))


def _copy_out(out: torch.Tensor | None, param: torch.Tensor, row: np.ndarray) -> None:
    if out is not None:
        runs_of(out, row).copy_(runs_of(param, row))


def _spread_sums(grad: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    sums = torch.zeros(int(row[INNER] // row[UNIT]), dtype=torch.float32, device=grad.device)
    for tile in _split(row, 1):
        slots_of(sums, tile, int(row[SLOT])).add_(_segment_sums(grad, tile))
    return sums


def _segment_sums(grad: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    squares = segments_of(grad, row).float().square()
    return squares.sum((0, 2)) if row[SLOT_STEP] == 0 else squares.sum(2)


def _tiles(rectangles: Rectangles, unit: int) -> Iterator[np.ndarray]:
    for row in rectangles.table:
        yield from _split(row, unit)


def _split(row: np.ndarray, unit: int) -> Iterator[np.ndarray]:
    """Cuts a rectangle into rectangles of at most TILE elements, whole segments each."""
    outer, inner = int(row[OUTER]), int(row[INNER])
    unit = max(unit, int(row[UNIT]))
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
