"""What the Triton kernel's programs are told: tables of tasks on the device, made from a plan's rectangles."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..plan.step_plan import CLASS, INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, Rectangles

BLOCK = 1024  # elements in a program's hands at a time
COLUMNS = 128  # of these, columns where a program steps several segments side by side; the rest are rows
FIELDS = 13  # columns of a task table, see Tasks


@dataclass(frozen=True)
class Tasks:
    """Rectangles as programs take them, on the device.

    Attributes:
        count: programs.
        owner: int32, (count,); the rectangle each program works in.
        table: int64, (rectangles, FIELDS); columns: first task, tasks along a run, columns per task, unit, runs per task,
            runs, stride, elements of a run, offset, slot, slots from one group of runs to the next,
            2 class + aligned (every run of a task begins at a multiple of four elements and has a multiple of four),
            which of the tensors stepped together.
        numels: float32, (rectangles,); elements of a whole segment.
    """

    count: int
    owner: torch.Tensor
    table: torch.Tensor
    numels: torch.Tensor


def tasks(of: Sequence[Rectangles], classes: Sequence[int], elementwise: bool, device: torch.device) -> Tasks:
    """Cuts rectangles into tasks: of BLOCK elements for an element-wise step, of whole segments otherwise, the largest
    first, so that no program is left alone at the end.

    Args:
        of: the rectangles of each tensor.
        classes: how many classes each tensor's plan has; they are numbered on from tensor to tensor.
    """
    first_class = np.cumsum([0, *classes])
    table = np.concatenate([rectangles.table for rectangles in of])
    numels = np.concatenate([rectangles.segment_numel for rectangles in of])
    tensor = np.repeat(np.arange(len(of)), [len(rectangles) for rectangles in of])
    order = np.arange(len(table))
    outer, inner, unit = table[:, OUTER], table[:, INNER], np.maximum(table[:, UNIT], 1)
    if elementwise:
        width = np.minimum(inner, BLOCK)
        runs = np.where(inner <= BLOCK, np.maximum(BLOCK // np.maximum(inner, 1), 1), 1)
    else:
        width = np.minimum(np.where(unit > COLUMNS, unit, COLUMNS // unit * unit), inner)
        runs = np.where(table[:, SLOT_STEP] == 0, outer, 1)
        order = np.argsort(-width * runs, kind="stable")
    along = -(-inner // width)
    fours = (table[:, [OFFSET, INNER]] % 4 == 0).all(1) & (width % 4 == 0)
    aligned = fours & ((table[:, STRIDE] % 4 == 0) | (outer == 1))
    count = along * -(-outer // runs)
    columns = np.stack(
        [
            count,
            along,
            width,
            unit,
            runs,
            outer,
            table[:, STRIDE],
            inner,
            table[:, OFFSET],
            table[:, SLOT],
            table[:, SLOT_STEP],
            2 * (table[:, CLASS] + first_class[tensor]) + aligned,
            tensor,
        ],
        axis=1,
    ).astype(np.int64)
    columns, count = columns[order], count[order]
    columns[:, 0] = np.cumsum(count) - count
    owner = np.repeat(np.arange(len(order), dtype=np.int32), count)
    return Tasks(
        len(owner),
        torch.from_numpy(owner).to(device),
        torch.from_numpy(columns).to(device),
        torch.from_numpy(numels[order].astype(np.float32)).to(device),
    )


@dataclass(frozen=True)
class Sums:
    """How the sums of rectangles that may share slots are added, in one order.

    Attributes:
        tasks: every rectangle with slots of its own in a buffer of ``size`` floats.
        rounds: (slots, places of the buffer): no slot twice in a round.
    """

    tasks: Tasks
    size: int
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def sums_of(rectangles: Rectangles, device: torch.device) -> Sums:
    """The tasks of :meth:`TritonKernel.sum_squares`."""
    table, slots, size = rectangles.table.copy(), [], 0
    for row in table:
        per_run, runs = row[INNER] // row[UNIT], 1 if row[SLOT_STEP] == 0 else row[OUTER]
        slots.append((row[SLOT] + np.arange(runs)[:, None] * row[SLOT_STEP] + np.arange(per_run)).ravel())
        row[SLOT], row[SLOT_STEP] = size, per_run if runs > 1 else 0
        size += len(slots[-1])
    wanted = np.concatenate(slots)
    order = np.argsort(wanted, kind="stable")
    ordered = wanted[order]
    first = np.searchsorted(ordered, ordered)  # where the equal slots begin
    turn = np.arange(size) - first
    rounds = tuple(
        (torch.from_numpy(ordered[turn == number]).to(device), torch.from_numpy(order[turn == number]).to(device))
        for number in range(int(turn.max()) + 1)
    )
    return Sums(tasks([Rectangles(table, rectangles.segment_numel)], [0], False, device), size, rounds)


class Kept:
    """Tables that were made for rectangles, for as long as these live.

    Which tensors are stepped together can change from step to step (a frozen layer, an expert without tokens), so that of
    tables that begin with the same rectangles the last ``most`` are kept.
    """

    most = 8

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Rectangles, dict] = weakref.WeakKeyDictionary()

    def get(self, of: Sequence[Rectangles], kind: str, device: torch.device, make: Callable[[], Any]) -> Any:
        """What ``make`` made for the same rectangles, kind and device."""
        known = self._known.setdefault(of[0], {})
        key = (kind, device, *map(id, of[1:]))
        if key in known:
            others, made = known[key]
            if all(other() is rectangles for other, rectangles in zip(others, of[1:])):
                return made
        made = make()
        known[key] = [weakref.ref(rectangles) for rectangles in of[1:]], made
        while len(known) > self.most:
            known.pop(next(iter(known)))
        return made
