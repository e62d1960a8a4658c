"""ShardMap: which part of which parameter lies where in the flat tensors that this rank's optimizer steps on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributed import ProcessGroup

from ..blocks import ParamLayout
from ..blocks.marks import marks_of


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter, row-major, lying at ``offset`` of a flat tensor.

    Under tensor parallelism the parameter is this rank's slice, and ``start`` counts within the slice.
    """

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class ShardBoundaries:
    """Where shard edges cut a parameter.

    Attributes:
        positions: element positions strictly inside the parameter where one rank's shard ends and another's begins,
            ascending; the same on every rank of the group.
        group: the ranks that hold the parameter's shards (data parallel); None for the default group.
        has_replicas: other pipeline stages hold copies of the parameter (a tied embedding), cut at places of their own, and
            ``positions`` are those of all copies. What lies between two positions is then summed alone and the sums
            are added in the order of the positions, so that all stages get the same sum of a row to the bit.
    """

    positions: np.ndarray
    group: ProcessGroup | None = None
    has_replicas: bool = False


@dataclass(frozen=True)
class TensorParallelSplit:
    """A parameter whose segments go on in the slices of other ranks: output rows, under tensor parallelism along the input
    axis, or a vector that is one segment.

    Attributes:
        group: the ranks that hold the slices; all of them hold the same fragments of their slices.
        parts: how many slices make a whole segment.
    """

    group: ProcessGroup
    parts: int


@dataclass
class ShardMap:
    """What every adapter supplies: the flat tensors of this rank's optimizer and what lies in them.

    Attributes:
        flats: (flat tensor, its fragments) in the optimizer's order; elements in no fragment are padding.
        boundaries: parameters that shard edges cut, in an order that is the same on all ranks. Only Adam-mini needs them.
        splits: parameters whose segments span tensor-parallel ranks. Only Adam-mini needs them.
    """

    flats: Sequence[tuple[torch.Tensor, Sequence[Fragment]]]
    boundaries: Mapping[str, ShardBoundaries] = field(default_factory=dict)
    splits: Mapping[str, TensorParallelSplit] = field(default_factory=dict)


def spans_slices(param: torch.Tensor, layout: ParamLayout) -> bool:
    """Whether the segments of a tensor-parallel slice go on in the slices of other ranks.

    Args:
        param: with its framework's marks.
        layout: of the slice, as the optimizer's step uses it.
    """
    axis = marks_of(param).split_axis
    if axis is None:
        return False
    return axis == (0 if layout.transposed else 1) or all(piece.unit == 0 for piece in layout.pieces)


def split_at_replica_boundaries(shards: ShardMap, layout_of: Callable[[str], ParamLayout]) -> ShardMap:
    """The same shards with the fragments of parameters that have copies ending where any copy is cut.

    Parameters whose segments do not lie one after another stay as they are; their parts are summed as without copies.
    """
    split = {
        name: cut.positions
        for name, cut in shards.boundaries.items()
        if cut.has_replicas and layout_of(name).is_consecutive
    }
    flats = [
        (flat, [part for fragment in fragments for part in _parts(fragment, split.get(fragment.name))])
        for flat, fragments in shards.flats
    ]
    return ShardMap(flats, shards.boundaries, shards.splits)


def _parts(fragment: Fragment, positions: np.ndarray | None) -> list[Fragment]:
    if positions is None:
        return [fragment]
    end = fragment.start + fragment.numel
    inside = positions[(positions > fragment.start) & (positions < end)]
    edges = [fragment.start, *map(int, inside), end]
    return [
        Fragment(fragment.name, low, high - low, fragment.offset + low - fragment.start)
        for low, high in zip(edges, edges[1:])
    ]


def even_boundaries(numel: int, shard: int, first: int = 0) -> np.ndarray:
    """Positions inside a parameter that lies at ``first`` of a buffer cut every ``shard`` elements."""
    edges = np.arange(first // shard + 1, -(-(first + numel) // shard), dtype=np.int64) * shard - first
    return edges[(edges > 0) & (edges < numel)]
