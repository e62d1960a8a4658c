"""Optimizers that step hidden matrices as wholes (Muon) and everything else element by element or segment by segment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import BlockError, BlockType, ParamLayout
from ..blocks.layout import MATRIX, Piece
from ..plan.shards import Fragment, ShardMap
from ..plan.step_plan import Rectangles, StepClass, StepPlan, piece_rectangles
from ..plan.views import runs_of
from ..rules.muon import MATCH_RMS, MATRIX_BLOCKS
from .base import BlockwiseOptimizer, Due
from .elementwise import ElementwiseOptimizer
from .matrix_exchange import Route, exchanged, rounds_of
from .segmentwise import SegmentwiseOptimizer
from .tensors import is_row, row, write_back

# of the quintic iteration, as in torch.optim.Muon
_A, _B, _C, _EPS = 3.4445, -4.7750, 2.0315, 1e-7


def orthogonalized(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz: about U V^T of each matrix's U S V^T, computed in bfloat16.

    Args:
        matrices: (batch, m, n).
        steps: iterations.
    """
    found = matrices.bfloat16()
    tall = found.shape[-2] > found.shape[-1]
    found = found.mT if tall else found
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), found, beta=_A)
    return found.mT if tall else found


class _Held(NamedTuple):
    """What this rank has of a matrix."""

    due: Due
    fragment: Fragment
    layout: ParamLayout  # of this rank's tensor-parallel slice
    layouts: tuple[ParamLayout, ...]  # of all slices, or of the one whole
    group: dict

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its elements in a row of the tensor's."""
        return tensor[self.fragment.offset :][: self.fragment.numel]


class MatrixSteps(BlockwiseOptimizer):
    """The part of the optimizers of rules that need whole matrices which steps these.

    A matrix whose parts lie on several ranks, in ZeRO's, FSDP's or Megatron's shards or in tensor-parallel slices, is brought
    to one of them, orthogonalized there, and its parts sent back: the same numbers however it is cut.
    """

    def _forget_tensors(self) -> None:
        super()._forget_tensors()
        self._forget_routes()

    def _forget_routes(self) -> None:
        self._rest: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._pieces: dict[Fragment, list[Rectangles]] = {}
        self._routed: list[tuple[Route, ...]] | None = None
        self._layouts: dict[str, tuple[ParamLayout, ...]] = {}  # of matrices in slices, slice after slice

    def attach_shards(self, shards: ShardMap) -> None:
        """As the base's; collective over the tensor-parallel groups of matrices."""
        sliced = {name: of for name, of in shards.slices.items() if self._is_matrix(name)}
        for name in sliced:
            if self.block_map[name].batch_dims:
                raise BlockError(
                    f"{type(self).__name__} cannot put together {name} of shape {self.block_map[name].shape}, stacked experts, "
                    f"from its tensor-parallel slices; use a tensor-parallel size of 1 for experts, or BlockwiseAdamW"
                )
        super().attach_shards(shards)
        self._forget_routes()
        for group in dict.fromkeys(of.group for of in sliced.values()):
            mine = {name: self.block_map[name] for name, of in sliced.items() if of.group is group}
            ranks: list[dict[str, ParamLayout]] = [{}] * group.size()
            dist.all_gather_object(ranks, mine, group=group)
            self._layouts.update({name: tuple(layouts[name] for layouts in ranks) for name in mine})

    def is_matrix(self, tensor: torch.Tensor) -> bool:
        """Whether the rule's matrix step, and not AdamW's or Adam-mini's, is that of a parameter."""
        return self._is_matrix(self.block_map.require_name(tensor))

    def _is_matrix(self, name: str) -> bool:
        layout = self.block_map[name]
        return (
            layout.kind == MATRIX
            and len(layout.shape) - layout.batch_dims == 2
            and set(layout.blocks) <= set(MATRIX_BLOCKS)
        )

    # ---- the step

    def _step(self, due: Sequence[Due]) -> None:
        super()._step([Due(one.tensor, self._rest_of(one.tensor, one.plan), one.values) for one in due])
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        held = {
            fragment.name: self._part_of(one, fragment, groups[id(one.tensor)])
            for one in due
            for fragment in self.fragments_of(one.tensor)
            if fragment.numel and self._is_matrix(fragment.name)
        }
        for routes in self._rounds(held):
            self._step_matrices(routes, held)

    def _part_of(self, due: Due, fragment: Fragment, group: dict) -> _Held:
        layout = self.block_map[fragment.name]
        return _Held(due, fragment, layout, self._layouts.get(fragment.name, (layout,)), group)

    def _rest_of(self, tensor: torch.Tensor, plan: StepPlan) -> StepPlan:
        """The plan without what lies in matrices."""
        found = self._rest.get(tensor)
        if found is None:
            places = [(f.offset, f.offset + f.numel) for f in self.fragments_of(tensor) if self._is_matrix(f.name)]
            found = self._rest[tensor] = plan.without(places)
        return found

    def _rounds(self, held: Mapping[str, _Held]) -> Iterator[list[Route]]:
        """The matrices that this rank has parts of, those that it has whole one by one."""
        if self._routed is None:
            layouts = {name: layout for name, layout in self.block_map.items() if self._is_matrix(name)}
            self._routed = [] if self.shards is None else rounds_of(self.shards, layouts)
        routed = {route.name for routes in self._routed for route in routes}
        for name in held:
            if name not in routed:
                yield [Route(name)]
        for routes in self._routed:
            here = [route for route in routes if route.name in held]
            if here:
                yield here

    def _step_matrices(self, routes: Sequence[Route], held: Mapping[str, _Held]) -> None:
        updates = {route.name: self._next_update(held[route.name]) for route in routes}
        by_name = {route.name: route for route in routes}
        steps = exchanged(routes, updates, lambda route, whole: _orthogonal(route, whole, held[route.name]))
        for name, step in steps.items():
            self._move(held[name], by_name[name], step)

    def _next_update(self, held: _Held) -> torch.Tensor:
        """This rank's part of the momentum's update, in bfloat16 where the matrix is worked on; steps the momentum."""
        p, momentum = held.due.tensor, held.group["momentum"]
        assert p.grad is not None  # only tensors with a gradient are stepped
        average = self.state[p]["exp_avg"]
        moved = row(average)
        grad, mine = held.part(row(p.grad)).to(p.dtype), held.part(moved)
        mine.lerp_(grad, 1 - momentum)
        update = (grad.lerp(mine, momentum) if held.group["nesterov"] else mine).bfloat16()
        if not is_row(average):
            write_back(average, moved)
        return update.to(self.matrix_device or update.device)

    def _move(self, held: _Held, route: Route, step: torch.Tensor) -> None:
        """Applies this rank's part of an orthogonal step, at the rates and scales of the rows' pieces."""
        (p, plan, values), layout = held.due, held.layout
        moved = row(p)
        mine, step = held.part(moved), step.to(moved.device)
        if held.fragment not in self._pieces:
            self._pieces[held.fragment] = piece_rectangles(held.fragment, layout)
        for piece, rectangles in zip(layout.pieces, self._pieces[held.fragment]):
            of = plan.classes.index(StepClass(piece.block, layout.kind, layout.own, layout.lr_scale))
            lr, decay = values.lrs[of], values.decays[of]
            factor = lr * _scale(held.group["matrix_scale"], *_shape(piece, held.layouts, route))
            for rectangle in rectangles.table:
                self._move_runs(mine, step, rectangle, 1 - lr * decay, factor)
        if not is_row(p):
            write_back(p, moved)
        out = self.copy_of(p) if self._copies else None
        if out is not None:
            held.part(out).copy_(mine)

    def _move_runs(
        self, mine: torch.Tensor, step: torch.Tensor, rectangle: np.ndarray, kept: float, factor: float
    ) -> None:
        moved = runs_of(mine, rectangle)
        moved.mul_(kept).sub_(runs_of(step, rectangle).to(moved.dtype).mul_(factor))


class MatrixwiseOptimizer(MatrixSteps, ElementwiseOptimizer):
    """Base of the optimizers that step matrices as wholes and the rest element by element."""


class MatrixSegmentOptimizer(MatrixSteps, SegmentwiseOptimizer):
    """Base of those that step the rest with a state per segment."""


def _orthogonal(route: Route, whole: torch.Tensor, held: _Held) -> torch.Tensor:
    """A matrix's parts (q, k, v, ...), each orthogonalized by itself; flat, slice after slice, as it was given."""
    made = torch.empty_like(whole)
    given, places = (
        [
            _matrices(one, of)
            for one, of in zip(of_all.view(len(held.layouts), *held.layout.shape).unbind(), held.layouts)
        ]
        for of_all in (whole, made)
    )
    along, rows_of = _splits_inputs(held.layout, route) + 1, [_rows_of(of) for of in held.layouts]
    for part in dict.fromkeys(part for rows in rows_of for part in rows):
        having = [number for number, rows in enumerate(rows_of) if part in rows]
        pieces = [given[number][:, rows_of[number][part]] for number in having]
        found = orthogonalized(torch.cat(pieces, along).contiguous(), held.group["ns_steps"]).to(whole.dtype)
        for number, values in zip(having, found.split([piece.shape[along] for piece in pieces], along)):
            places[number][:, rows_of[number][part]] = values
    return made


_Part = tuple[BlockType, str]  # what of a fused weight it is: rows of one block type and role


def _rows_of(layout: ParamLayout) -> dict[_Part, list[int]]:
    """Of each part, its output units over all repeats."""
    found: dict[_Part, list[int]] = {}
    for start, end, piece in layout.spans():
        found.setdefault((piece.block, piece.role), []).extend(range(start, end))
    return found


def _matrices(tensor: torch.Tensor, layout: ParamLayout) -> torch.Tensor:
    """(stacked matrices, output units, inputs), as a view."""
    shaped = tensor.view(layout.batch, *tensor.shape[layout.batch_dims :])
    return shaped.mT if layout.transposed else shaped


def _splits_inputs(layout: ParamLayout, route: Route) -> bool:
    return route.slices is not None and route.axis == (0 if layout.transposed else 1)


def _shape(piece: Piece, layouts: Sequence[ParamLayout], route: Route) -> tuple[int, int]:
    """Rows and columns of the part that a piece belongs to, over all slices."""
    rows = [
        other.size * layout.repeat
        for layout in layouts
        for other in layout.pieces
        if (other.block, other.role) == (piece.block, piece.role)
    ]
    columns = [layout.inputs for layout in layouts]
    return (rows[0], sum(columns)) if _splits_inputs(layouts[0], route) else (sum(rows), columns[0])


def _scale(kind: str, rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns)) if kind == MATCH_RMS else math.sqrt(max(1.0, rows / columns))
