"""ShardMap: which elements of which parameters this rank's flat optimizer tensors hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.distributed import ProcessGroup

from ..blocks import ParamLayout
from ..blocks.marks import marks_of


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter, row-major, at ``offset`` in a flat tensor.

    Under tensor parallelism the parameter is this rank's slice, and ``start`` is an index into the slice.
    """

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class ShardBoundaries:
    """The boundaries between ranks' shards inside a parameter.

    Attributes:
        positions: element indices strictly inside the parameter at which another rank's shard begins: int64,
            ascending, the same on every rank of the group.
        group: the ranks that hold the parameter's shards (data parallel); None: the default group.
        has_replicas: other pipeline stages hold replicas (a tied embedding) with boundaries of their own;
            ``positions`` are then those of all replicas. Each interval between positions is summed on its own and the
            partial sums are added in the order of positions, so that a row's sum is bitwise identical on all stages.
        first_rank: of the group, the rank whose shard holds what is before the first position; each of the next ranks holds
            what is up to the next one. Without replicas only.
    """

    positions: np.ndarray
    group: ProcessGroup | None = None
    has_replicas: bool = False
    first_rank: int = 0

    def parts(self, numel: int) -> tuple[tuple[int, int, int], ...]:
        """(rank of the group, start, elements) of every shard of a parameter, in order."""
        edges = [0, *map(int, self.positions), numel]
        return tuple(
            (self.first_rank + number, low, high - low) for number, (low, high) in enumerate(itertools.pairwise(edges))
        )


@dataclass(frozen=True)
class TensorParallelSplit:
    """A parameter whose segments span tensor-parallel ranks: rows split along the input axis, or a vector that is one
    segment.

    Attributes:
        group: the ranks that hold the slices; all of them hold the same fragments of their slices.
        parts: number of slices of a segment.
    """

    group: ProcessGroup
    parts: int


@dataclass(frozen=True)
class TensorParallelSlices:
    """A matrix that tensor-parallel ranks hold slices of, all of one shape; rank by rank they make the whole.

    Attributes:
        group: the ranks; all of them hold the same fragments of their slices.
        axis: of the slice, along which the slices follow one another.
    """

    group: ProcessGroup
    axis: int


@dataclass
class ShardMap:
    """The flat tensors of this rank's optimizer and their contents; supplied by every framework adapter.

    Attributes:
        flats: (flat tensor, its fragments) in the optimizer's order; elements in no fragment are padding.
        boundaries: parameters that span several shards, in the same order on all ranks. Used by Adam-mini and Muon.
        splits: parameters whose segments span tensor-parallel ranks. Used by Adam-mini only.
        groups: per flat tensor, the ranks whose tensors in its place are disjoint parts of the same parameters; None: it
            holds them whole. Empty: all are whole. Used by block_clip only, as is ``counted``.
        counted: per flat tensor, whether its squares count in a norm over ``groups``: not those of a copy, which another rank
            counts. Empty: all do.
        slices: matrices that tensor-parallel ranks hold slices of, in the same order on all ranks. Used by Muon only.
    """

    flats: Sequence[tuple[torch.Tensor, Sequence[Fragment]]]
    boundaries: Mapping[str, ShardBoundaries] = field(default_factory=dict)
    splits: Mapping[str, TensorParallelSplit] = field(default_factory=dict)
    groups: Sequence[ProcessGroup | None] = ()
    counted: Sequence[bool] = ()
    slices: Mapping[str, TensorParallelSlices] = field(default_factory=dict)


def spans_slices(param: torch.Tensor, layout: ParamLayout) -> bool:
    """Whether the segments of a tensor-parallel slice span the slices of other ranks.

    Args:
        param: the slice, with its framework's attributes.
        layout: the slice's layout in the optimizer's step.
    """
    axis = marks_of(param).split_axis
    if axis is None:
        return False
    return axis == (0 if layout.transposed else 1) or all(piece.unit == 0 for piece in layout.pieces)


def slices_of(
    named: Iterable[tuple[str, torch.Tensor]], group_of: Callable[[torch.Tensor], ProcessGroup]
) -> dict[str, TensorParallelSlices]:
    """The matrices that are tensor-parallel slices.

    Args:
        named: this rank's parameters, with their framework's attributes; also those that other ranks' shards hold alone.
        group_of: the tensor-parallel group of a parameter.
    """
    found = {}
    for name, param in named:
        axis, group = marks_of(param).split_axis, group_of(param)
        if axis is not None and len(marks_of(param).shape or param.shape) > 1 and group.size() > 1:
            found[name] = TensorParallelSlices(group, max(axis, 0))  # where the axis is not stated, along the rows
    return found


def split_at_replica_boundaries(shards: ShardMap, layout_of: Callable[[str], ParamLayout]) -> ShardMap:
    """The shard map with the fragments of replicated parameters split at the shard boundaries of all replicas.

    Parameters whose segments are not contiguous in memory are left unchanged; they are summed as without replicas.
    """
    split = {
        name: boundary.positions
        for name, boundary in shards.boundaries.items()
        if boundary.has_replicas and layout_of(name).is_consecutive
    }
    flats = [
        (flat, [part for fragment in fragments for part in _parts(fragment, split.get(fragment.name))])
        for flat, fragments in shards.flats
    ]
    return replace(shards, flats=flats)


def _parts(fragment: Fragment, positions: np.ndarray | None) -> list[Fragment]:
    if positions is None:
        return [fragment]
    end = fragment.start + fragment.numel
    inside = positions[(positions > fragment.start) & (positions < end)]
    edges = [fragment.start, *map(int, inside), end]
    return [
        Fragment(fragment.name, low, high - low, fragment.offset + low - fragment.start)
        for low, high in itertools.pairwise(edges)
    ]


def fragments_within(places: Iterable[tuple[str, int, int]], begin: int, size: int) -> list[Fragment]:
    """What lies in elements [begin, begin + size) of a buffer, a rank's shard.

    Args:
        places: (parameter, its first element in the buffer, its elements).
    """
    found = []
    for name, start, numel in places:
        low, high = max(start, begin), min(start + numel, begin + size)
        if low < high:
            found.append(Fragment(name, low - start, high - low, low - begin))
    return found


def even_boundaries(numel: int, shard: int, first: int = 0) -> np.ndarray:
    """Shard boundaries inside a parameter at element ``first`` of a buffer with a boundary every ``shard`` elements.

    Returns:
        int64, ascending, relative to the parameter, strictly between 0 and ``numel``.
    """
    edges = np.arange(first // shard + 1, -(-(first + numel) // shard), dtype=np.int64) * shard - first
    return edges[(edges > 0) & (edges < numel)]
