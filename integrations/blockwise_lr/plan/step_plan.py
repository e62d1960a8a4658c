"""Step plans: a flat tensor as strided rectangles of one block type each, and for Adam-mini their segments.

A rectangle is ``outer`` runs of ``inner`` consecutive elements, with ``stride`` elements from one start to the next. A
plain weight is one rectangle; a QKV weight fused per head is two or three for any number of heads, and a transposed one
three. A plan's size is linear in the number of parameters and shard boundaries, and independent of rows and elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..blocks.layout import BIAS, ParamLayout, Piece, Rate
from ..blocks.types import BlockError, BlockType
from .shards import Fragment

# columns of a rectangle table
OFFSET, OUTER, STRIDE, INNER, CLASS, SLOT, SLOT_STEP, UNIT = range(8)


@dataclass(frozen=True)
class StepClass:
    """Elements that share learning rate and weight decay; the fields are as in ParamLayout."""

    block: BlockType
    kind: str  # "matrix", "bias" or "norm"
    own: str = ""
    lr_scale: float = 1.0

    @property
    def rate(self) -> Rate:
        """What their learning rate follows from."""
        return Rate(self.own or self.block.value, self.lr_scale)


@dataclass(frozen=True, eq=False)  # hashed by identity: kernels cache what they derive from a table in weak references
class Rectangles:
    """A table of rectangles.

    Attributes:
        table: int64, (rectangles, 8); columns: OFFSET of the first element in the flat tensor, OUTER runs, STRIDE
            between their starts, INNER elements per run, CLASS (index into StepPlan.classes); for Adam-mini also: the
            first run's first SLOT in the second moment, SLOT_STEP from one run's first slot to the next run's (0: all
            runs share their slots), UNIT consecutive elements of a run per slot.
        segment_numel: float64, (rectangles,); elements of a whole segment, on all ranks together; 0 for AdamW.
    """

    table: np.ndarray
    segment_numel: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    @property
    def numel(self) -> int:
        """Elements covered."""
        return int((self.table[:, OUTER] * self.table[:, INNER]).sum())

    @cached_property
    def extent(self) -> tuple[int, int]:
        """(elements, slots) that tensors must have for all rectangles to be within bounds."""
        if not len(self.table):
            return 0, 0
        offset, outer, stride, inner, _, slot, slot_step, unit = self.table.T
        elements = offset + (outer - 1) * stride + inner
        slots = slot + (outer - 1) * slot_step + np.maximum(inner // np.maximum(unit, 1), 1)
        return int(elements.max()), int(slots.max())


@dataclass(frozen=True)
class SegmentRun:
    """Consecutive segments of one piece of one parameter, with consecutive slots.

    Attributes:
        name: the parameter.
        piece: index into its layout's pieces.
        first: the first segment's index within the piece, over all repeats and stacked matrices.
        slot: the first segment's slot in the flat tensor's second moment.
        count: number of segments.
        start: the first parameter element of the fragment that holds them.
    """

    name: str
    piece: int
    first: int
    slot: int
    count: int
    start: int


@dataclass(frozen=True)
class StepPlan:
    """The rectangles and segments of one flat tensor's step.

    Attributes:
        numel: elements of the flat tensor, including padding.
        classes: the step classes that the CLASS column indexes.
        local: rectangles whose segments are entirely in this shard (element-wise optimizers: all rectangles).
        shared: rectangles whose segments span several shards; their sums of squares are reduced over ranks before
            the step. Empty for element-wise optimizers.
        slots: number of second moments in this shard (Adam-mini); 0 for element-wise optimizers.
        runs: the segments of the slots.
    """

    numel: int
    classes: tuple[StepClass, ...]
    local: Rectangles
    shared: Rectangles
    slots: int = 0
    runs: tuple[SegmentRun, ...] = ()

    @property
    def nbytes(self) -> int:
        """Approximate memory of the plan in bytes."""
        return sum(r.table.nbytes + r.segment_numel.nbytes for r in (self.local, self.shared)) + 100 * len(self.runs)

    def without(self, places: Sequence[tuple[int, int]]) -> StepPlan:
        """The plan without what lies in some ranges (first element, end) of the flat tensor, with the same classes and slots.

        Args:
            places: of whole fragments.
        """
        return (
            replace(self, local=_outside(self.local, places), shared=_outside(self.shared, places)) if places else self
        )


def element_plan(numel: int, fragments: Iterable[Fragment], layouts: Sequence[ParamLayout]) -> StepPlan:
    """The plan of an element-wise optimizer: fragments as rectangles of one block type each.

    Args:
        numel: elements of the flat tensor.
        fragments: its contents.
        layouts: the layout of each fragment's parameter.
    """
    classes: dict[StepClass, int] = {}
    rows: list[tuple[int, ...]] = []
    for fragment, layout in zip(fragments, layouts):
        for piece_rows in _piece_rows(_by_block(layout), fragment, classes):
            rows.extend(row for row, _ in piece_rows)
    return StepPlan(numel, tuple(classes), _rectangles(rows, [0.0] * len(rows)), _rectangles([], []))


def segment_plan(
    numel: int, fragments: Iterable[Fragment], layouts: Sequence[ParamLayout], *, parts: dict[str, int] | None = None
) -> StepPlan:
    """The plan of Adam-mini: rectangles, and one slot of the second moment per segment in this shard.

    Args:
        numel, fragments, layouts: as for :func:`element_plan`.
        parts: parameter name -> number of tensor-parallel slices that its segments span; 1 for names not in it.

    Raises:
        BlockError: a layout whose head size is not known.
    """
    classes: dict[StepClass, int] = {}
    rows: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
    numels: dict[bool, list[float]] = {False: [], True: []}
    runs: list[SegmentRun] = []
    slots = 0
    for fragment, layout in zip(fragments, layouts):
        split = (parts or {}).get(fragment.name, 1)
        for index, piece_rows in enumerate(_piece_rows(_known(layout), fragment, classes)):
            if not piece_rows:
                continue
            first = min(row[SLOT] for row, _ in piece_rows)
            last = max(_last_segment(row) for row, _ in piece_rows)
            segment = float(segment_numel(layout, index) * split)
            for row, spans_shards in piece_rows:
                key = spans_shards or split > 1
                rows[key].append((*row[:SLOT], row[SLOT] - first + slots, *row[SLOT_STEP:]))
                numels[key].append(segment)
            runs.append(SegmentRun(fragment.name, index, first, slots, last - first + 1, fragment.start))
            slots += last - first + 1
    return StepPlan(
        numel,
        tuple(classes),
        _rectangles(rows[False], numels[False]),
        _rectangles(rows[True], numels[True]),
        slots,
        tuple(runs),
    )


def piece_rectangles(fragment: Fragment, layout: ParamLayout) -> list[Rectangles]:
    """Where each piece of the layout lies in a fragment, counted from the fragment's first element."""
    pieces = tuple(replace(piece, unit=piece.size) for piece in layout.pieces)
    rows = _piece_rows(replace(layout, pieces=pieces), replace(fragment, offset=0), {})
    return [_rectangles([row for row, _ in of], [0.0] * len(of)) for of in rows]


def element_biases(layout: ParamLayout) -> ParamLayout:
    """For a bias, its layout with one Adam-mini segment per element (as the official code); others unchanged."""
    if layout.kind != BIAS:
        return layout
    pieces = tuple(Piece(piece.block, piece.size, 1, piece.role) for piece in layout.pieces)
    return replace(layout, pieces=pieces)


def segments_per_repeat(piece: Piece) -> int:
    """Segments of a piece in one repeat of the pattern; 1 if all repeats share one."""
    return piece.size // piece.unit if piece.unit else 1


def segment_numel(layout: ParamLayout, index: int) -> int:
    """Elements of one segment of a piece."""
    piece = layout.pieces[index]
    return (piece.unit or piece.size * layout.repeat) * layout.inputs


def shared_segments(layout: ParamLayout, index: int, positions: np.ndarray) -> np.ndarray:
    """Indices of a piece's segments that span several shards: int64, ascending.

    Args:
        layout: the parameter's layout.
        index: the piece's index in ``layout.pieces``.
        positions: shard boundaries, strictly inside the parameter, as in :class:`ShardBoundaries`.
    """
    piece = layout.pieces[index]
    start = sum(p.size for p in layout.pieces[:index])
    per_repeat = segments_per_repeat(piece)
    if layout.transposed:  # a column spans the whole matrix, so any boundary inside divides every column
        matrix = layout.inputs * layout.outputs
        matrices = np.unique(positions[positions % matrix != 0] // matrix)
        per_matrix = layout.repeat * per_repeat
        return (matrices[:, None] * per_matrix + np.arange(per_matrix)).ravel()
    if not piece.unit:
        if len(layout.pieces) == layout.repeat == 1:  # one segment per stacked matrix
            matrix = piece.size * layout.inputs
            return np.unique(positions[positions % matrix != 0] // matrix)
        end = ((layout.repeat - 1) * layout.period + start + piece.size) * layout.inputs
        return np.arange(int(((positions > start * layout.inputs) & (positions < end)).any()))
    period, unit = layout.period * layout.inputs, piece.unit * layout.inputs
    repeat, within = positions // period, positions % period - start * layout.inputs
    inside = (within > 0) & (within < piece.size * layout.inputs) & (within % unit != 0)
    return np.unique(repeat[inside] * per_repeat + within[inside] // unit)


def slot_numel(rectangles: Rectangles) -> tuple[np.ndarray, np.ndarray]:
    """(slots, numel): the rectangles' slots, int64, ascending, and the elements of each whole segment, float32."""
    slots, numel = [np.empty(0, np.int64)], [np.empty(0)]
    for row, segment in zip(rectangles.table, rectangles.segment_numel):
        run = row[SLOT] + np.arange(row[INNER] // row[UNIT])
        steps = np.arange(row[OUTER] if row[SLOT_STEP] else 1) * row[SLOT_STEP]
        slots.append((steps[:, None] + run).ravel())
        numel.append(np.full(len(slots[-1]), segment))
    unique, index = np.unique(np.concatenate(slots), return_index=True)
    return unique, np.concatenate(numel)[index].astype(np.float32)


def _known(layout: ParamLayout) -> ParamLayout:
    if any(piece.unit is None for piece in layout.pieces):
        raise BlockError(
            f"{layout.name}: Adam-mini needs the number of heads, and nothing says it (or a tensor-parallel slice "
            f"cuts heads); set model.config = {{'num_attention_heads': 16}}, with your model's number, before the "
            f"optimizer is built, or pass block_map=map_blocks(model, config=…) where you build it yourself"
        )
    return layout


def _by_block(layout: ParamLayout) -> ParamLayout:
    """The layout with adjacent pieces of one block type merged, which is enough for an element-wise step."""
    merged: list[Piece] = []
    for piece in layout.pieces:
        if merged and merged[-1].block == piece.block:
            merged[-1] = Piece(piece.block, merged[-1].size + piece.size)
        else:
            merged.append(Piece(piece.block, piece.size))
    if len(merged) == 1:  # one block type: contiguous memory for any axis and repeat
        whole = (Piece(merged[0].block, layout.numel),)
        return replace(layout, shape=(layout.numel,), pieces=whole, repeat=1, transposed=False, batch_dims=0)
    return replace(layout, pieces=tuple(merged))


Row = tuple[tuple[int, ...], bool]  # (table columns, with the segment's index for SLOT; whether it spans shards)


def _piece_rows(layout: ParamLayout, fragment: Fragment, classes: dict[StepClass, int]) -> list[list[Row]]:
    """The rectangles of a fragment, piece by piece."""
    build = _columns if layout.transposed else _chunks
    pieces, start = [], 0
    for piece in layout.pieces:
        of = StepClass(piece.block, layout.kind, layout.own, layout.lr_scale)
        number = classes.setdefault(of, len(classes))
        pieces.append(build(layout, piece, start, fragment, number) if fragment.numel else [])
        start += piece.size
    return pieces


def _chunks(layout: ParamLayout, piece: Piece, start: int, fragment: Fragment, number: int) -> list[Row]:
    """Rows: a piece is one consecutive chunk of memory per repeat."""
    size, period, repeats = piece.size * layout.inputs, layout.period * layout.inputs, layout.batch * layout.repeat
    unit = piece.unit * layout.inputs if piece.unit else size
    if len(layout.pieces) == 1 and (piece.unit or layout.repeat == 1):  # the repeats follow without a gap
        size, period, repeats = size * repeats, period * repeats, 1
    per_repeat = size // unit if piece.unit or repeats == 1 else 0
    first, end = fragment.start, fragment.start + fragment.numel
    base = start * layout.inputs
    shift = fragment.offset - fragment.start
    shared = not piece.unit and repeats > 1
    is_divided = shared and any(base < edge < (repeats - 1) * period + base + size for edge in (first, end))
    rows: list[Row] = []
    full_first, full_end = -(-first // period), end // period
    for repeat in _partial_periods(first, end, period):
        low = max(first, repeat * period + base)
        high = min(end, repeat * period + base + size)
        rows += _run(low, high, repeat * period + base, unit, repeat * per_repeat, shift, number, shared)
    if full_end > full_first:
        at = full_first * period + base
        rows.append(
            (
                (at + shift, full_end - full_first, period, size, number, full_first * per_repeat, per_repeat, unit),
                False,
            )
        )
    if shared:  # a segment in several rectangles is summed as one that spans shards, even if it is on one rank only
        return [(row, is_divided or len(rows) > 1) for row, _ in rows]
    return rows


def _partial_periods(first: int, end: int, period: int) -> list[int]:
    """Periods that are only partly in [first, end)."""
    partial = {first // period} if first % period else set()
    return sorted(partial | ({end // period} if end % period else set()))


def _run(low: int, high: int, base: int, unit: int, segment: int, shift: int, number: int, shared: bool) -> list[Row]:
    """Rectangles for [low, high) of a chunk that begins at ``base``: up to one partial segment, whole segments, and up
    to one partial segment."""
    if low >= high:
        return []
    if shared:
        return [((low + shift, 1, 0, high - low, number, segment, 0, high - low), True)]
    rows: list[Row] = []
    head = min(high, base + -(-(low - base) // unit) * unit)
    tail = max(head, base + (high - base) // unit * unit)
    for begin, stop, spans_shards in ((low, head, True), (head, tail, False), (tail, high, True)):
        if begin < stop:
            length = stop - begin if spans_shards else unit
            rows.append(
                ((begin + shift, 1, 0, stop - begin, number, segment + (begin - base) // unit, 0, length), spans_shards)
            )
    return rows


def _columns(layout: ParamLayout, piece: Piece, start: int, fragment: Fragment, number: int) -> list[Row]:
    """Columns: a piece is one run in every input row, and its segments span all input rows."""
    width, matrix = layout.outputs, layout.inputs * layout.outputs
    unit = piece.unit or piece.size
    shift = fragment.offset - fragment.start
    rows: list[Row] = []
    for index in range(fragment.start // matrix, -(-(fragment.start + fragment.numel) // matrix)):
        low = max(fragment.start, index * matrix)
        high = min(fragment.start + fragment.numel, (index + 1) * matrix)
        spans_shards = high - low < matrix
        for repeat in range(layout.repeat):
            base = repeat * layout.period + start
            segment = (index * layout.repeat + repeat) * (piece.size // unit) if piece.unit else index
            for line in _partial_periods(low, high, width):
                begin, stop = max(low, line * width + base), min(high, line * width + base + piece.size)
                found = _run(begin, stop, line * width + base, unit, segment, shift, number, False)
                rows += [(row, True) for row, _ in found]
            full_first, full_end = -(-low // width), high // width
            if full_end > full_first:
                rows.append(
                    (
                        (
                            full_first * width + base + shift,
                            full_end - full_first,
                            width,
                            piece.size,
                            number,
                            segment,
                            0,
                            unit,
                        ),
                        spans_shards,
                    )
                )
    return rows


def _last_segment(row: tuple[int, ...]) -> int:
    return row[SLOT] + (row[OUTER] - 1) * row[SLOT_STEP] + max(row[INNER] // row[UNIT], 1) - 1


def _outside(rectangles: Rectangles, places: Sequence[tuple[int, int]]) -> Rectangles:
    offset = rectangles.table[:, OFFSET]
    kept = np.full(len(rectangles), True)
    for first, end in places:
        kept &= (offset < first) | (offset >= end)
    return Rectangles(rectangles.table[kept], rectangles.segment_numel[kept])


def _rectangles(rows: list[tuple[int, ...]], numels: list[float]) -> Rectangles:
    table = np.array(rows, dtype=np.int64).reshape(-1, 8)
    return Rectangles(table, np.array(numels, dtype=np.float64))
