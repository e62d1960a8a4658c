"""The Triton kernel: one launch over one flat tensor, whatever lies in it; also under TRITON_INTERPRET=1 without a GPU.

A plan's rectangles are given to programs by two small tables on the device: which rectangle a program works in, and the
rectangles. Segments are never shared between programs and no atomics are used, so results are the same in every run.

Consecutive elements that begin at a multiple of four are moved 16 bytes at a time. The compiler is told so by
multiplying with ALIGN, not by tl.multiple_of: that marks the value wherever it is used, the other branch included.
"""

# mypy: allow-untyped-defs
# (device code is compiled by Triton, which reads constexpr annotations only)
from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..plan.step_plan import CLASS, INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, Rectangles, StepPlan
from ..rules.base import UpdateRule
from .interface import StepValues, fits, refuse_other_sizes
from .reference import ReferenceKernel

BLOCK = 1024  # elements in a program's hands at a time
COLUMNS = 128  # of these, columns where a program steps several segments side by side; the rest are rows
_FIELDS = 12  # columns of a task table, see Tasks


# ---- device code


@triton.jit
def _task(owner, table, FIELDS: tl.constexpr):
    """A program's element offset, slot, class, runs, stride, width, unit, alignment and rectangle; see Tasks."""
    number = tl.program_id(0)
    rectangle = tl.load(owner + number)
    row = table + rectangle * FIELDS
    within = number - tl.load(row + 0)
    per_run, columns, unit = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    group, along = within // per_run, within % per_run
    runs_per_task = tl.load(row + 4)
    stride = tl.load(row + 6)
    at = tl.load(row + 8) + group * runs_per_task * stride + along * columns
    slot = tl.load(row + 9) + group * tl.load(row + 10) + along * (columns // unit)
    runs = tl.minimum(runs_per_task, tl.load(row + 5) - group * runs_per_task)
    width = tl.minimum(columns, tl.load(row + 7) - along * columns)
    flags = tl.load(row + 11)
    return at, slot, flags // 2, runs, stride, width, unit, flags % 2, rectangle


@triton.jit
def _multiple(number, ALIGN: tl.constexpr):
    return number // ALIGN * ALIGN


@triton.jit
def _elements(
    p, g, m, v, out, at, mask, lr, keep, scalars, BODY: tl.constexpr, STATES: tl.constexpr, COPY: tl.constexpr
):
    grad = tl.load(g + at, mask=mask).to(tl.float32)
    first, second = tl.load(m + at, mask=mask), grad
    if STATES == 2:
        second = tl.load(v + at, mask=mask)
    param, first, second = BODY(tl.load(p + at, mask=mask), grad, first, second, lr, keep, scalars)
    tl.store(m + at, first, mask=mask)
    if STATES == 2:
        tl.store(v + at, second, mask=mask)
    tl.store(p + at, param, mask=mask)
    if COPY:
        tl.store(out + at, param.to(tl.bfloat16), mask=mask)


@triton.jit
def _element_step(p, g, m, v, out, owner, table, numbers, classes, BODY: tl.constexpr, STATES: tl.constexpr,
                  COPY: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr):  # fmt: skip
    at, _, number, runs, stride, width, _, aligned, _ = _task(owner, table, FIELDS)
    lr, keep, scalars = tl.load(numbers + number), tl.load(numbers + classes + number), numbers + 2 * classes
    element = tl.arange(0, BLOCK)
    if (runs == 1) & (aligned == 1):
        _elements(p, g, m, v, out, _multiple(at, 4) + element, element < _multiple(width, 4), lr, keep, scalars, BODY,
                  STATES, COPY)  # fmt: skip
    else:
        narrow = width.to(tl.int32)
        run = element // narrow
        _elements(p, g, m, v, out, at + run * stride + element % narrow, run < runs, lr, keep, scalars, BODY, STATES,
                  COPY)  # fmt: skip


@triton.jit
def _one_sum(g, at, runs, stride, width, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of one segment: runs of width elements."""
    element, width = tl.arange(0, BLOCK), _multiple(width, ALIGN)
    total = tl.zeros((BLOCK,), tl.float32)
    for run in range(0, runs):
        place = _multiple(at + run * stride, ALIGN)
        for start in range(0, width, BLOCK):
            grad = tl.load(g + place + start + element, mask=start + element < width, other=0.0).to(tl.float32)
            total += grad * grad
    return tl.sum(total, 0)


@triton.jit
def _one_update(p, g, m, out, at, runs, stride, width, moment, lr, keep, scalars, BODY: tl.constexpr, COPY: tl.constexpr,
                ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    element, width = tl.arange(0, BLOCK), _multiple(width, ALIGN)
    for run in range(0, runs):
        base = _multiple(at + run * stride, ALIGN)
        for start in range(0, width, BLOCK):
            place = base + start + element
            mask = start + element < width
            grad = tl.load(g + place, mask=mask).to(tl.float32)
            param, first, _ = BODY(tl.load(p + place, mask=mask), grad, tl.load(m + place, mask=mask), moment, lr, keep,
                                   scalars)  # fmt: skip
            tl.store(m + place, first, mask=mask)
            tl.store(p + place, param, mask=mask)
            if COPY:
                tl.store(out + place, param.to(tl.bfloat16), mask=mask)


@triton.jit
def _side_sums(g, at, runs, stride, width, unit, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Per column, the sum of squares of its segment: ``unit`` neighbouring columns of all runs."""
    column, row = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, runs, ROWS):
        run = start + row
        place = at + run[:, None] * stride + column[None, :]
        mask = (run < runs)[:, None] & (column < width)[None, :]
        grad = tl.load(g + place, mask=mask, other=0.0).to(tl.float32)
        total += grad * grad
    sums, segment = tl.sum(total, 0), column // unit.to(tl.int32)
    same = segment[:, None] == segment[None, :]
    return tl.sum(tl.where(same, sums[None, :], 0.0), 1)


@triton.jit
def _side_update(p, g, m, out, at, runs, stride, width, moments, lr, keep, scalars, BODY: tl.constexpr,
                 COPY: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    column, row = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    for start in range(0, runs, ROWS):
        run = start + row
        place = at + run[:, None] * stride + column[None, :]
        mask = (run < runs)[:, None] & (column < width)[None, :]
        grad = tl.load(g + place, mask=mask).to(tl.float32)
        param, first, _ = BODY(tl.load(p + place, mask=mask), grad, tl.load(m + place, mask=mask), moments[None, :], lr,
                               keep, scalars)  # fmt: skip
        tl.store(m + place, first, mask=mask)
        tl.store(p + place, param, mask=mask)
        if COPY:
            tl.store(out + place, param.to(tl.bfloat16), mask=mask)


@triton.jit
def _segment_step(p, g, m, v, out, owner, table, numels, numbers, classes, BODY: tl.constexpr, MOMENT: tl.constexpr,
                  OWN_SUMS: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
                  FIELDS: tl.constexpr):  # fmt: skip
    at, slot, number, runs, stride, width, unit, aligned, rectangle = _task(owner, table, FIELDS)
    lr, keep, scalars = tl.load(numbers + number), tl.load(numbers + classes + number), numbers + 2 * classes
    if unit > COLUMNS:  # one segment
        moment = tl.load(v + slot)
        if OWN_SUMS:
            if aligned == 1:
                total = _one_sum(g, at, runs, stride, width, 4, BLOCK)
            else:
                total = _one_sum(g, at, runs, stride, width, 1, BLOCK)
            moment = MOMENT(moment, total / tl.load(numels + rectangle), scalars)
            tl.store(v + slot, moment)
        if aligned == 1:
            _one_update(p, g, m, out, at, runs, stride, width, moment, lr, keep, scalars, BODY, COPY, 4, BLOCK)
        else:
            _one_update(p, g, m, out, at, runs, stride, width, moment, lr, keep, scalars, BODY, COPY, 1, BLOCK)
    else:  # segments side by side; every column knows its own segment's moment
        column = tl.arange(0, COLUMNS)
        slots, held = slot + column // unit.to(tl.int32), column < width
        moments = tl.load(v + slots, mask=held, other=0.0)
        if OWN_SUMS:
            totals = _side_sums(g, at, runs, stride, width, unit, COLUMNS, BLOCK // COLUMNS)
            moments = MOMENT(moments, totals / tl.load(numels + rectangle), scalars)
            tl.debug_barrier()  # every column has read its old moment before one of them writes the new
            tl.store(v + slots, moments, mask=held & (column % unit.to(tl.int32) == 0))
        _side_update(p, g, m, out, at, runs, stride, width, moments, lr, keep, scalars, BODY, COPY, COLUMNS,
                     BLOCK // COLUMNS)  # fmt: skip


@triton.jit
def _sums(g, sums, owner, table, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, FIELDS: tl.constexpr):
    """Every segment's sum to a slot of its own."""
    at, slot, _, runs, stride, width, unit, aligned, _ = _task(owner, table, FIELDS)
    if unit > COLUMNS:
        if aligned == 1:
            tl.store(sums + slot, _one_sum(g, at, runs, stride, width, 4, BLOCK))
        else:
            tl.store(sums + slot, _one_sum(g, at, runs, stride, width, 1, BLOCK))
    else:
        column = tl.arange(0, COLUMNS)
        totals = _side_sums(g, at, runs, stride, width, unit, COLUMNS, BLOCK // COLUMNS)
        first = column % unit.to(tl.int32) == 0
        tl.store(sums + slot + column // unit.to(tl.int32), totals, mask=(column < width) & first)


# ---- host code


@dataclass(frozen=True)
class Tasks:
    """Rectangles as programs take them, on the device.

    Attributes:
        count: programs.
        owner: int32, (count,); the rectangle each program works in.
        table: int64, (rectangles, 12); columns: first task, tasks along a run, columns per task, unit, runs per task,
            runs, stride, elements of a run, offset, slot, slots from one group of runs to the next,
            2 class + aligned (every run of a task begins at a multiple of four elements and has a multiple of four).
        numels: float32, (rectangles,); elements of a whole segment.
    """

    count: int
    owner: torch.Tensor
    table: torch.Tensor
    numels: torch.Tensor


def tasks(rectangles: Rectangles, elementwise: bool, device: torch.device) -> Tasks:
    """Cuts rectangles into tasks: of BLOCK elements for an element-wise step, of whole segments otherwise, the largest
    first, so that no program is left alone at the end."""
    order = np.arange(len(rectangles))
    columns = np.zeros((len(rectangles), _FIELDS), dtype=np.int64)
    table = rectangles.table
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
    columns[:] = np.stack(
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
            2 * table[:, CLASS] + aligned,
        ],
        axis=1,
    )
    columns, count = columns[order], count[order]
    columns[:, 0] = np.cumsum(count) - count
    owner = np.repeat(np.arange(len(order), dtype=np.int32), count)
    return Tasks(
        len(owner),
        torch.from_numpy(owner).to(device),
        torch.from_numpy(columns).to(device),
        torch.from_numpy(rectangles.segment_numel[order].astype(np.float32)).to(device),
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
    return Sums(tasks(Rectangles(table, rectangles.segment_numel), False, device), size, rounds)


@functools.cache
def compiled_body(body: Callable[..., Any]) -> Any:
    """A rule's body, a plain function, as device code; one object for each, so that what is compiled is found again."""
    return triton.jit(body)


class TritonKernel:
    """The kernel in Triton. float32 tensors and rules with a body for it; others go to the reference."""

    name = "triton"

    def __init__(self) -> None:
        self._reference = ReferenceKernel()
        self._known: weakref.WeakKeyDictionary[Rectangles, dict] = weakref.WeakKeyDictionary()

    def element_step(
        self,
        rule: UpdateRule,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        if rule.triton is None or not fits(_devices(), param, grad, *states) or not _takes(out):
            return self._reference.element_step(rule, param, grad, states, plan, values, out)
        refuse_other_sizes(plan.local, param, grad, *states, out)
        work = self._made(plan.local, param.device, "elements", functools.partial(tasks, elementwise=True))
        if work.count:
            with _on(param.device):
                _element_step[(work.count,)](
                    param,
                    grad,
                    states[0],
                    states[-1],
                    param if out is None else out,
                    work.owner,
                    work.table,
                    *_numbers(values, param.device),
                    BODY=compiled_body(rule.triton),
                    STATES=len(states),
                    COPY=out is not None,
                    BLOCK=BLOCK,
                    FIELDS=_FIELDS,
                )

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        if not fits(_devices(), sums, grad):
            return self._reference.sum_squares(grad, rectangles, sums)
        if not len(rectangles):
            return
        refuse_other_sizes(rectangles, grad, slots=sums)
        work = self._made(rectangles, grad.device, "sums", sums_of)
        buffer = torch.empty(work.size, dtype=torch.float32, device=grad.device)
        with _on(grad.device):
            _sums[(work.tasks.count,)](
                grad, buffer, work.tasks.owner, work.tasks.table, BLOCK=BLOCK, COLUMNS=COLUMNS, FIELDS=_FIELDS
            )
        for slots, places in work.rounds:
            sums[slots] += buffer[places]

    def segment_step(
        self,
        rule: UpdateRule,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        moments: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
        *,
        presummed: bool = False,
    ) -> None:
        if rule.triton is None or not fits(_devices(), param, grad, *states, moments) or not _takes(out):
            return self._reference.segment_step(
                rule, param, grad, states, moments, plan, values, out, presummed=presummed
            )
        rectangles = plan.shared if presummed else plan.local
        refuse_other_sizes(rectangles, param, grad, *states, out, slots=moments)
        work = self._made(rectangles, param.device, "segments", functools.partial(tasks, elementwise=False))
        if work.count:
            with _on(param.device):
                _segment_step[(work.count,)](
                    param,
                    grad,
                    states[0],
                    moments,
                    param if out is None else out,
                    work.owner,
                    work.table,
                    work.numels,
                    *_numbers(values, param.device),
                    BODY=compiled_body(rule.triton),
                    MOMENT=compiled_body(rule.triton_moment),
                    OWN_SUMS=not presummed,
                    COPY=out is not None,
                    BLOCK=BLOCK,
                    COLUMNS=COLUMNS,
                    FIELDS=_FIELDS,
                )

    def _made(self, rectangles: Rectangles, device: torch.device, kind: str, make: Callable[..., Any]) -> Any:
        known = self._known.setdefault(rectangles, {})
        if (kind, device) not in known:
            known[kind, device] = make(rectangles, device=device)
        return known[kind, device]


def interpreted() -> bool:
    """Whether the device code runs in Triton's interpreter, on the CPU."""
    return not isinstance(_element_step, triton.JITFunction)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _numbers(values: StepValues, device: torch.device) -> tuple[torch.Tensor, int]:
    """The step's numbers on the device (learning rates, 1 - lr * decay, the rule's scalars), by one copy that the host does
    not wait for; and the number of classes."""
    keeps = (1 - lr * decay for lr, decay in zip(values.lrs, values.decays))
    numbers = torch.tensor([*values.lrs, *keeps, *values.scalars], dtype=torch.float32)
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    return numbers, len(values.lrs)


def _devices() -> tuple[str, ...]:
    """Where Triton runs."""
    return ("cpu", "cuda") if interpreted() else ("cuda",)


def _takes(out: torch.Tensor | None) -> bool:
    return out is None or out.dtype == torch.bfloat16
