"""The Triton kernel: one launch per flat tensor on a GPU; the same code runs on the CPU under TRITON_INTERPRET=1."""
from __future__ import annotations

import os
from typing import Any

import torch

from ..optim.plan import Rectangles, StepPlan
from .interface import StepValues
from .reference import ReferenceKernel
from .tiling import COLUMNS, LAYER, tiles

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of PyTorch comes without it
    triton = None

# Elements per program. A GPU hides latency with many programs, so tiles are smaller than on the CPU.
TILE = 1 << 13
BLOCK = 1024


def missing() -> str | None:
    """Why the kernel cannot be used on this machine, or None."""
    if triton is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU"
    return None


if triton is not None:

    @triton.jit
    def _at(offset, stride, inner, index):
        """Positions of a tile's elements ``index``, counted run after run."""
        run = index // inner
        return offset + run * stride + (index - run * inner)

    @triton.jit
    def _sum_squares(grad, offset, stride, inner, count, BLOCK: tl.constexpr):
        """Sum of squares of ``count`` elements in runs of ``inner``."""
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            g = tl.load(grad + _at(offset, stride, inner, index), mask=index < count, other=0.0).to(tl.float32)
            total += g * g
        return tl.sum(total, axis=0)

    @triton.jit
    def _column_sums(grad, offset, stride, outer, first, inner, BLOCK: tl.constexpr):
        """Sums of squares of columns first … first + BLOCK - 1 of a tile, over all its runs."""
        column = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for run in range(0, outer):
            g = tl.load(grad + offset + run * stride + column, mask=column < inner, other=0.0).to(tl.float32)
            total += g * g
        return total

    @triton.jit
    def _mini_update(param, grad, exp_avg, at, mask, keep, rest1, step):
        p = tl.load(param + at, mask=mask, other=0.0)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=mask, other=0.0)
        m += rest1 * (g - m)
        tl.store(exp_avg + at, m, mask=mask)
        tl.store(param + at, p * keep - step * m, mask=mask)

    @triton.jit
    def _adamw_kernel(param, grad, exp_avg, exp_avg_sq, table, lrs, decays, beta2, rest1, rest2, eps, correction1, root,
                      COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
        row = table + tl.program_id(0).to(tl.int64) * COLUMNS
        offset, outer, stride, inner, number = (tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3),
                                                tl.load(row + 4))
        lr = tl.load(lrs + number)
        keep = 1.0 - lr * tl.load(decays + number)
        step = lr / correction1
        for start in range(0, outer * inner, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < outer * inner
            at = _at(offset, stride, inner, index)
            p = tl.load(param + at, mask=mask, other=0.0)
            g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(exp_avg + at, mask=mask, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
            m += rest1 * (g - m)
            v = beta2 * v + rest2 * g * g
            tl.store(exp_avg + at, m, mask=mask)
            tl.store(exp_avg_sq + at, v, mask=mask)
            tl.store(param + at, p * keep - step * (m / (tl.sqrt(v) / root + eps)), mask=mask)

    @triton.jit
    def _adam_mini_kernel(param, grad, exp_avg, moments, table, lrs, decays, beta2, rest1, rest2, eps, correction1, root,
                          OWN_SUMS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
        row = table + tl.program_id(0).to(tl.int64) * COLUMNS
        offset, outer, stride, inner = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        number, slot, slot_step, unit = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        numel, spread = tl.load(row + 8).to(tl.float32), tl.load(row + 9)
        lr = tl.load(lrs + number)
        keep = 1.0 - lr * tl.load(decays + number)
        scale = lr / correction1
        if unit == 1:  # a segment per column of all runs, or per element: no sums across lanes
            groups = tl.where(spread != 0, 1, outer)
            depth = tl.where(spread != 0, outer, 1)
            for group in range(0, groups):
                base = offset + group * stride
                for first in range(0, inner, BLOCK):
                    column = first + tl.arange(0, BLOCK)
                    mask = column < inner
                    where = moments + slot + group * slot_step + column
                    v = tl.load(where, mask=mask, other=0.0)
                    if OWN_SUMS:
                        v = beta2 * v + rest2 * (_column_sums(grad, base, stride, depth, first, inner, BLOCK) / numel)
                        tl.store(where, v, mask=mask)
                    step = scale / (tl.sqrt(v) / root + eps)
                    for run in range(0, depth):
                        _mini_update(param, grad, exp_avg, base + run * stride + column, mask, keep, rest1, step)
        else:
            units = inner // unit
            groups = tl.where(spread != 0, 1, outer)
            depth = tl.where(spread != 0, outer, 1)
            for segment in range(0, groups * units):
                group = segment // units
                begin = offset + group * stride + (segment - group * units) * unit
                where = moments + slot + group * slot_step + (segment - group * units)
                v = tl.load(where)
                if OWN_SUMS:
                    v = beta2 * v + rest2 * (_sum_squares(grad, begin, stride, unit, depth * unit, BLOCK) / numel)
                    tl.store(where, v)
                step = scale / (tl.sqrt(v) / root + eps)
                for start in range(0, depth * unit, BLOCK):
                    index = start + tl.arange(0, BLOCK)
                    _mini_update(param, grad, exp_avg, _at(begin, stride, unit, index), index < depth * unit, keep,
                                 rest1, step)

    @triton.jit
    def _sums_kernel(grad, layers, table, slots, COLUMNS: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr):
        row = table + tl.program_id(0).to(tl.int64) * COLUMNS
        offset, outer, stride, inner = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        slot, slot_step, unit, spread = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 9)
        out = layers + tl.load(row + LAYER) * slots + slot
        units = inner // unit
        groups = tl.where(spread != 0, 1, outer)
        depth = tl.where(spread != 0, outer, 1)
        if unit == 1:
            for group in range(0, groups):
                for first in range(0, inner, BLOCK):
                    column = first + tl.arange(0, BLOCK)
                    found = _column_sums(grad, offset + group * stride, stride, depth, first, inner, BLOCK)
                    tl.store(out + group * slot_step + column, found, mask=column < inner)
        else:
            for segment in range(0, groups * units):
                group = segment // units
                within = segment - group * units
                found = _sum_squares(grad, offset + group * stride + within * unit, stride, unit, depth * unit, BLOCK)
                tl.store(out + group * slot_step + within, found)


class TritonKernel:
    """The kernel in Triton. float32 tensors, gradients of any floating type; others go to the reference."""

    name = "triton"

    def __init__(self) -> None:
        self._reference = ReferenceKernel()
        self._tables: dict[tuple[int, torch.device], tuple[Rectangles, torch.Tensor]] = {}

    def adamw(self, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
              plan: StepPlan, values: StepValues) -> None:
        if not _all_float32(param, exp_avg, exp_avg_sq):
            return self._reference.adamw(param, grad, exp_avg, exp_avg_sq, plan, values)
        table = self._table(plan.whole, param.device)
        if len(table):
            _adamw_kernel[(len(table),)](param, grad, exp_avg, exp_avg_sq, table, *_numbers(values, param.device),
                                         COLUMNS=COLUMNS, BLOCK=BLOCK)

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        table = self._table(rectangles, grad.device)
        if not len(table):
            return
        depth = int(table[:, LAYER].max()) + 1
        layers = torch.zeros(depth, sums.numel(), dtype=torch.float32, device=grad.device)
        _sums_kernel[(len(table),)](grad, layers, table, sums.numel(), COLUMNS=COLUMNS, LAYER=LAYER, BLOCK=BLOCK)
        sums.add_(layers.sum(0))

    def adam_mini(self, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
                  plan: StepPlan, values: StepValues) -> None:
        if not _all_float32(param, exp_avg, exp_avg_sq):
            return self._reference.adam_mini(param, grad, exp_avg, exp_avg_sq, plan, values)
        self._mini(plan.whole, True, param, grad, exp_avg, exp_avg_sq, values)

    def adam_mini_cut(self, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
                      plan: StepPlan, values: StepValues) -> None:
        if not _all_float32(param, exp_avg, exp_avg_sq):
            return self._reference.adam_mini_cut(param, grad, exp_avg, exp_avg_sq, plan, values)
        self._mini(plan.cut, False, param, grad, exp_avg, exp_avg_sq, values)

    def _mini(self, rectangles: Rectangles, own_sums: bool, param: torch.Tensor, grad: torch.Tensor,
              exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, values: StepValues) -> None:
        table = self._table(rectangles, param.device)
        if len(table):
            _adam_mini_kernel[(len(table),)](param, grad, exp_avg, exp_avg_sq, table, *_numbers(values, param.device),
                                             OWN_SUMS=own_sums, COLUMNS=COLUMNS, BLOCK=BLOCK)

    def _table(self, rectangles: Rectangles, device: torch.device) -> torch.Tensor:
        key = (id(rectangles), device)
        if key not in self._tables:  # the rectangles are kept too, so that their id stays taken
            self._tables[key] = (rectangles, torch.from_numpy(tiles(rectangles, TILE)).to(device))
        return self._tables[key][1]


def _all_float32(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def _numbers(values: StepValues, device: torch.device) -> tuple[Any, ...]:
    """The step's numbers as kernel arguments; per-class ones go to the device without waiting for it."""
    per_class = torch.tensor([values.lrs, values.decays], dtype=torch.float32)
    if device.type == "cuda":
        per_class = per_class.pin_memory().to(device, non_blocking=True)
    return (per_class[0], per_class[1], values.beta2, 1 - values.beta1, 1 - values.beta2, values.eps, values.correction1,
            values.correction2_sqrt)
