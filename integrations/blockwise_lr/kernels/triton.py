"""The Triton kernel: one launch over all tensors, whatever lies in them; also under TRITON_INTERPRET=1 without a GPU.

A plan's rectangles are given to programs by two small tables on the device: which rectangle a program works in, and the
rectangles. Any number of tensors are stepped by one launch: a third table says how far each lies from the first, in
elements. Segments are never shared between programs and no atomics are used, so results are the same in every run.

Consecutive elements that begin at a multiple of four are moved 16 bytes at a time. The compiler is told so by
multiplying with ALIGN, not by tl.multiple_of: that marks the value wherever it is used, the other branch included.
"""

# mypy: allow-untyped-defs
# (device code is compiled by Triton, which reads constexpr annotations only)
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..plan.step_plan import Rectangles
from ..rules.base import UpdateRule
from .interface import Work, fits, refuse_other_sizes
from .reference import ReferenceKernel
from .triton_tasks import BLOCK, COLUMNS, FIELDS, Kept, sums_of, tasks

_PLACES = 5  # columns of the table of places: parameter, gradient, the two states, copy


# ---- device code


@triton.jit
def _task(owner, table, FIELDS: tl.constexpr):
    """A program's element offset, slot, class, runs, stride, width, unit, alignment, rectangle and tensor; see Tasks."""
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
    return at, slot, flags // 2, runs, stride, width, unit, flags % 2, rectangle, tl.load(row + 12)


@triton.jit
def _multiple(number, ALIGN: tl.constexpr):
    return number // ALIGN * ALIGN


@triton.jit
def _of(p, g, m, out, places, tensor, MANY: tl.constexpr, PLACES: tl.constexpr, ALIGN: tl.constexpr):
    """The pointers of a tensor, but for that of its second state. One more load before the work can begin: where there
    is one tensor only, it is left out (a third of Adam-mini's time on an H200, whose programs are short)."""
    if not MANY:
        return p, g, m, out
    row = places + tensor * PLACES
    return (
        p + _multiple(tl.load(row), ALIGN),
        g + _multiple(tl.load(row + 1), ALIGN),
        m + _multiple(tl.load(row + 2), ALIGN),
        out + _multiple(tl.load(row + 4), ALIGN),
    )


@triton.jit
def _second(places, tensor, MANY: tl.constexpr, PLACES: tl.constexpr):
    """How far the tensor's second state, or its segments' state, lies from the first tensor's."""
    if not MANY:
        return tensor * 0
    return tl.load(places + tensor * PLACES + 3)


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
def _element_step(p, g, m, v, out, owner, table, places, numbers, classes, BODY: tl.constexpr, STATES: tl.constexpr,
                  COPY: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, MANY: tl.constexpr,
                  PLACES: tl.constexpr):  # fmt: skip
    at, _, number, runs, stride, width, _, aligned, _, tensor = _task(owner, table, FIELDS)
    lr, keep, scalars = tl.load(numbers + number), tl.load(numbers + classes + number), numbers + 2 * classes
    second = _second(places, tensor, MANY, PLACES)
    element = tl.arange(0, BLOCK)
    if (runs == 1) & (aligned == 1):
        p, g, m, out = _of(p, g, m, out, places, tensor, MANY, PLACES, 4)
        _elements(p, g, m, v + _multiple(second, 4), out, _multiple(at, 4) + element, element < _multiple(width, 4), lr,
                  keep, scalars, BODY, STATES, COPY)  # fmt: skip
    else:
        p, g, m, out = _of(p, g, m, out, places, tensor, MANY, PLACES, 1)
        narrow = width.to(tl.int32)
        run = element // narrow
        _elements(p, g, m, v + second, out, at + run * stride + element % narrow, run < runs, lr, keep, scalars, BODY,
                  STATES, COPY)  # fmt: skip


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
def _one_segment(p, g, m, v, out, places, tensor, at, slot, numel, lr, keep, scalars, runs, stride, width,
                 BODY: tl.constexpr, MOMENT: tl.constexpr, OWN_SUMS: tl.constexpr, COPY: tl.constexpr,
                 ALIGN: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    p, g, m, out = _of(p, g, m, out, places, tensor, MANY, PLACES, ALIGN)
    moment = tl.load(v + slot)
    if OWN_SUMS:
        total = _one_sum(g, at, runs, stride, width, ALIGN, BLOCK)
        moment = MOMENT(moment, total / numel, scalars)
        tl.store(v + slot, moment)
    _one_update(p, g, m, out, at, runs, stride, width, moment, lr, keep, scalars, BODY, COPY, ALIGN, BLOCK)


@triton.jit
def _segment_step(p, g, m, v, out, owner, table, places, numels, numbers, classes, BODY: tl.constexpr,
                  MOMENT: tl.constexpr, OWN_SUMS: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
                  COLUMNS: tl.constexpr, FIELDS: tl.constexpr, MANY: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    at, slot, number, runs, stride, width, unit, aligned, rectangle, tensor = _task(owner, table, FIELDS)
    lr, keep, scalars = tl.load(numbers + number), tl.load(numbers + classes + number), numbers + 2 * classes
    v += _second(places, tensor, MANY, PLACES)
    numel = tl.load(numels + rectangle)
    if unit > COLUMNS:  # one segment
        if aligned == 1:
            _one_segment(p, g, m, v, out, places, tensor, at, slot, numel, lr, keep, scalars, runs, stride, width, BODY,
                         MOMENT, OWN_SUMS, COPY, 4, BLOCK, MANY, PLACES)  # fmt: skip
        else:
            _one_segment(p, g, m, v, out, places, tensor, at, slot, numel, lr, keep, scalars, runs, stride, width, BODY,
                         MOMENT, OWN_SUMS, COPY, 1, BLOCK, MANY, PLACES)  # fmt: skip
    else:  # segments side by side; every column knows its own segment's moment
        p, g, m, out = _of(p, g, m, out, places, tensor, MANY, PLACES, 1)
        column = tl.arange(0, COLUMNS)
        slots, held = slot + column // unit.to(tl.int32), column < width
        moments = tl.load(v + slots, mask=held, other=0.0)
        if OWN_SUMS:
            totals = _side_sums(g, at, runs, stride, width, unit, COLUMNS, BLOCK // COLUMNS)
            moments = MOMENT(moments, totals / numel, scalars)
            tl.debug_barrier()  # every column has read its old moment before one of them writes the new
            tl.store(v + slots, moments, mask=held & (column % unit.to(tl.int32) == 0))
        _side_update(p, g, m, out, at, runs, stride, width, moments, lr, keep, scalars, BODY, COPY, COLUMNS,
                     BLOCK // COLUMNS)  # fmt: skip


@triton.jit
def _sums(g, sums, owner, table, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, FIELDS: tl.constexpr):
    """Every segment's sum to a slot of its own."""
    at, slot, _, runs, stride, width, unit, aligned, _, _ = _task(owner, table, FIELDS)
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


@functools.cache
def compiled_body(body: Callable[..., Any]) -> Any:
    """A rule's body, a plain function, as device code; one object for each, so that what is compiled is found again."""
    return triton.jit(body)


class TritonKernel:
    """The kernel in Triton. float32 tensors and rules with a body for it; others go to the reference."""

    name = "triton"

    def __init__(self) -> None:
        self._reference = ReferenceKernel()
        self._kept = Kept()

    def step(self, rule: UpdateRule, works: Sequence[Work], *, presummed: bool = False) -> None:
        together: dict[Any, tuple[list[Work], list[tuple[int, ...]]]] = {}
        for work in works:
            if rule.triton is None or not fits(_devices(), *work.tensors()) or not _takes(work.out):
                self._reference.step(rule, [work], presummed=presummed)
                continue
            refuse_other_sizes(
                work.rectangles(presummed), work.param, work.grad, *work.states, work.out, slots=work.moments
            )
            key = (work.param.device, work.grad.dtype, work.values.scalars, work.out is None)
            addresses = tuple(tensor.data_ptr() for tensor in _placed(work))
            group, places = together.setdefault(key if _is_aligned(work, addresses) else id(work), ([], []))
            group.append(work)
            places.append(addresses)
        for group, places in together.values():
            self._launch(rule, group, places, presummed)

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        if not fits(_devices(), sums, grad):
            return self._reference.sum_squares(grad, rectangles, sums)
        if not len(rectangles):
            return
        refuse_other_sizes(rectangles, grad, slots=sums)
        work = self._kept.get([rectangles], "sums", grad.device, lambda: sums_of(rectangles, grad.device))
        buffer = torch.empty(work.size, dtype=torch.float32, device=grad.device)
        with _on(grad.device):
            _sums[(work.tasks.count,)](
                grad, buffer, work.tasks.owner, work.tasks.table, BLOCK=BLOCK, COLUMNS=COLUMNS, FIELDS=FIELDS
            )
        for slots, places in work.rounds:
            sums[slots] += buffer[places]

    def _launch(
        self, rule: UpdateRule, works: Sequence[Work], addresses: Sequence[tuple[int, ...]], presummed: bool
    ) -> None:
        """One launch for tensors that differ in nothing but their plans and learning rates."""
        first, of = works[0], [work.rectangles(presummed) for work in works]
        device, elementwise = first.param.device, first.moments is None
        made = self._kept.get(
            of,
            "elements" if elementwise else "segments",
            device,
            lambda: tasks(of, [len(work.values.lrs) for work in works], elementwise, device),
        )
        if not made.count:
            return
        places = _places(first, addresses, device) if len(works) > 1 else made.table  # unused where there is one
        arguments = (*_placed(first), made.owner, made.table, places)
        sizes = {
            "COPY": first.out is not None,
            "BLOCK": BLOCK,
            "FIELDS": FIELDS,
            "MANY": len(works) > 1,
            "PLACES": _PLACES,
        }
        body, numbers = compiled_body(rule.triton), _numbers(works, device)
        with _on(device):
            if elementwise:
                _element_step[(made.count,)](*arguments, *numbers, BODY=body, STATES=len(first.states), **sizes)
                return
            _segment_step[(made.count,)](
                *arguments,
                made.numels,
                *numbers,
                BODY=body,
                MOMENT=compiled_body(rule.triton_moment),
                OWN_SUMS=not presummed,
                COLUMNS=COLUMNS,
                **sizes,
            )


def interpreted() -> bool:
    """Whether the device code runs in Triton's interpreter, on the CPU."""
    return not isinstance(_element_step, triton.JITFunction)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _placed(work: Work) -> tuple[torch.Tensor, ...]:
    """Parameter, gradient, first state, second state or moments, copy: the columns of the table of places. Where there is
    no second state or no copy, another tensor stands in, which the launch does not read there."""
    second = work.states[-1] if work.moments is None else work.moments
    return work.param, work.grad, work.states[0], second, work.param if work.out is None else work.out


def _is_aligned(work: Work, addresses: tuple[int, ...]) -> bool:
    """Whether four elements at a time can be moved wherever its tensors begin; those that cannot are stepped alone, with
    their alignment seen by the launch."""
    param, grad, state, second, out = addresses
    wide = (param | state | (second if work.moments is None else 0)) % 16 == 0
    copy = work.out is None or out % (4 * work.out.element_size()) == 0
    return wide and copy and grad % (4 * work.grad.element_size()) == 0


def _places(first: Work, addresses: Sequence[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """How far each tensor lies from that of the first work, in elements: int64, (works, _PLACES)."""
    sizes = np.array([tensor.element_size() for tensor in _placed(first)])
    table = np.array(addresses, dtype=np.int64)
    return _sent(torch.from_numpy((table - table[0]) // sizes), device)


def _numbers(works: Sequence[Work], device: torch.device) -> tuple[torch.Tensor, int]:
    """The step's numbers on the device (learning rates, 1 - lr * decay, the rule's scalars), and the number of classes."""
    lrs = [lr for work in works for lr in work.values.lrs]
    decays = [decay for work in works for decay in work.values.decays]
    keeps = (1 - lr * decay for lr, decay in zip(lrs, decays))
    return _sent(torch.tensor([*lrs, *keeps, *works[0].values.scalars], dtype=torch.float32), device), len(lrs)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on the device, by a copy that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _devices() -> tuple[str, ...]:
    """Where Triton runs."""
    return ("cpu", "cuda") if interpreted() else ("cuda",)


def _takes(out: torch.Tensor | None) -> bool:
    return out is None or out.dtype == torch.bfloat16
