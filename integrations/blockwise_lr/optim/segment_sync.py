"""Sums of squares of segments that several ranks share: one small all-reduce per step and process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ..blocks.layout import ParamLayout
from ..plan.shards import ShardBoundaries, ShardMap
from ..plan.step_plan import SegmentRun, StepPlan, segment_numel, shared_segments


@dataclass(frozen=True)
class _LocalToBuffer:
    """Where one flat tensor's partial sums go in the reduced buffer: slot ``slots[i]`` is written to ``index[i]``, and the
    whole segment's sum is read from ``total[i]``."""

    flat: int
    slots: torch.Tensor
    index: torch.Tensor
    total: torch.Tensor


@dataclass(frozen=True)
class SyncStage:
    """One all-reduce: which sums of which flat tensors meet in a buffer of ``size`` floats over ``group``.

    ``ordered_reduction``: (to, from), indices of the buffer that are added after the all-reduce, one pair after another.
    """

    group: dist.ProcessGroup | None
    size: int
    local_to_buffer: tuple[_LocalToBuffer, ...]
    ordered_reduction: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def start(self, sums: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dist.Work]:
        """Starts the all-reduce of the flat tensors' sums; returns the buffer and the handle to wait for."""
        buffer = torch.zeros(self.size, dtype=torch.float32, device=sums[0].device)
        for entry in self.local_to_buffer:
            buffer[entry.index] = sums[entry.flat][entry.slots]
        return buffer, dist.all_reduce(buffer, group=self.group, async_op=True)

    def finish(self, sums: Sequence[torch.Tensor], started: tuple[torch.Tensor, dist.Work]) -> None:
        """Waits, then writes the reduced sums back."""
        buffer, work = started
        work.wait()
        for to, places in self.ordered_reduction:
            buffer[to] += buffer[places]
        for entry in self.local_to_buffer:
            sums[entry.flat][entry.slots] = buffer[entry.total]


@dataclass(frozen=True)
class SegmentSync:
    """All of a step's all-reduces: those over shards, then those over tensor-parallel slices of what these gave."""

    over_shards: tuple[SyncStage, ...]
    over_slices: tuple[SyncStage, ...]

    def start(self, sums: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, dist.Work]]:
        """Starts those that can start; ``sums`` holds one tensor per flat tensor, in the order of the ShardMap."""
        return [stage.start(sums) for stage in self.over_shards or self.over_slices]

    def finish(self, sums: Sequence[torch.Tensor], started: list[tuple[torch.Tensor, dist.Work]]) -> None:
        """Waits for them, runs the others, and leaves the whole segments' sums in ``sums``."""
        for stage, handle in zip(self.over_shards or self.over_slices, started):
            stage.finish(sums, handle)
        for stage in self.over_slices if self.over_shards else ():
            stage.finish(sums, stage.start(sums))


def sync_of(shards: ShardMap, plans: Sequence[StepPlan], layouts: Mapping[str, ParamLayout]) -> SegmentSync:
    """The all-reduces of a step: one per group that shards parameters, then one per group that splits their inputs.

    The order within a buffer follows ``shards.boundaries`` (the same on all ranks), the parameter's pieces, and the segment's
    number, so ranks agree on it without talking. Every rank of a group takes part, also one that holds no cut segment.
    """
    over_shards = [
        _boundary_stage(
            group, {name: cut for name, cut in shards.boundaries.items() if cut.group is group}, plans, layouts
        )
        for group in dict.fromkeys(cut.group for cut in shards.boundaries.values())
    ]
    over_slices = [
        _split_stage(group, {name for name, split in shards.splits.items() if split.group is group}, plans)
        for group in dict.fromkeys(split.group for split in shards.splits.values())
    ]
    return SegmentSync(tuple(s for s in over_shards if s.size), tuple(s for s in over_slices if s.size))


def _boundary_stage(
    group: dist.ProcessGroup | None,
    boundaries: Mapping[str, ShardBoundaries],
    plans: Sequence[StepPlan],
    layouts: Mapping[str, ParamLayout],
) -> SyncStage:
    places: dict[tuple[str, int], _SlotIndex | _OrderedPartials] = {}
    size = 0
    for name, cut in boundaries.items():
        layout = layouts[name]
        for piece in range(len(layout.pieces)):
            found: _SlotIndex | _OrderedPartials
            if cut.has_replicas and layout.is_consecutive:
                found = _OrderedPartials.of(size, segment_numel(layout, piece), cut.positions)
            else:
                found = _SlotIndex(size, shared_segments(layout, piece, cut.positions))
            if found.size:
                places[name, piece] = found
                size += found.size
    entries: list[_LocalToBuffer] = []
    for flat, plan in enumerate(plans):
        runs = [(run, places[run.name, run.piece]) for run in plan.runs if (run.name, run.piece) in places]
        entries += _entries(flat, *zip(*(found.local_to_buffer(run) for run, found in runs))) if runs else []
    additions = [pair for found in places.values() for pair in found.ordered_reduction()]
    return SyncStage(group, size, tuple(entries), tuple(additions))


@dataclass(frozen=True)
class _SlotIndex:
    """Buffer layout of a piece's shared ``segments``: one float per segment, from ``base`` on."""

    base: int
    segments: np.ndarray

    @property
    def size(self) -> int:
        return len(self.segments)

    def local_to_buffer(self, run: SegmentRun) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A run's shared segments: their slots, the buffer indices of their partial sums and of the whole sums."""
        low, high = np.searchsorted(self.segments, (run.first, run.first + run.count))
        places = np.arange(low, high) + self.base
        return self.segments[low:high] - run.first + run.slot, places, places

    def ordered_reduction(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """None: the all-reduce itself adds a segment's parts."""
        return []


@dataclass(frozen=True)
class _OrderedPartials:
    """Buffer layout when tied replicas are sharded differently: one float per interval between shard boundaries inside a
    segment, from ``base`` on. One rank writes each float and they are added in a fixed order, so that replicas stay bitwise
    identical.

    Attributes:
        numel: elements of a segment; an embedding's are its rows.
        begins: where in the parameter each interval begins, ascending.
    """

    base: int
    numel: int
    begins: np.ndarray

    @staticmethod
    def of(base: int, numel: int, positions: np.ndarray) -> _OrderedPartials:
        """The intervals that boundaries at ``positions`` make of the segments they lie in."""
        inside = positions[positions % numel != 0]
        return _OrderedPartials(base, numel, np.unique(np.concatenate([inside // numel * numel, inside])))

    @property
    def size(self) -> int:
        return len(self.begins)

    def local_to_buffer(self, run: SegmentRun) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As of :class:`_SlotIndex`."""
        segments = np.unique(self.begins // self.numel)
        segments = segments[slice(*np.searchsorted(segments, (run.first, run.first + run.count)))]
        firsts = np.searchsorted(self.begins, segments * self.numel)
        places = np.searchsorted(self.begins, np.maximum(segments * self.numel, run.start))
        return segments - run.first + run.slot, places + self.base, firsts + self.base

    def ordered_reduction(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(to, from): all segments' second intervals to the first ones, then the third, and so on."""
        firsts = np.searchsorted(self.begins, self.begins // self.numel * self.numel)
        numbers = np.arange(self.size) - firsts
        pairs = [(firsts[numbers == n], np.flatnonzero(numbers == n)) for n in range(1, int(numbers.max()) + 1)]
        return [(torch.from_numpy(to + self.base), torch.from_numpy(places + self.base)) for to, places in pairs]


def _split_stage(group: dist.ProcessGroup, names: set[str], plans: Sequence[StepPlan]) -> SyncStage:
    entries: list[_LocalToBuffer] = []
    size = 0
    for flat, plan in enumerate(plans):
        slots = [np.arange(run.slot, run.slot + run.count) for run in plan.runs if run.name in names]
        count = sum(len(s) for s in slots)
        places = [np.arange(size, size + count)]
        entries += _entries(flat, slots, places, places)
        size += count
    _agree(group, size)
    return SyncStage(group, size, tuple(entries))


def _agree(group: dist.ProcessGroup, size: int) -> None:
    """Raises on all ranks of a tensor-parallel group where they hold different numbers of split segments."""
    sizes: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(sizes, size, group=group)
    if len(set(sizes)) > 1:
        raise RuntimeError(
            f"the tensor-parallel ranks hold different shards of their slices ({sizes} segments), so "
            f"Adam-mini cannot sum rows over them; use the local form (row_parallel_sums=False)"
        )


def _entries(flat: int, *parts: Sequence[np.ndarray]) -> list[_LocalToBuffer]:
    """The entry with these slots, indices and indices of totals; none where there are no slots."""
    if not sum(map(len, parts[0])):
        return []
    return [_LocalToBuffer(flat, *(torch.from_numpy(np.concatenate(part)) for part in parts))]
