"""Sums of squares of segments that shard edges cut: one small all-reduce a step and process group."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ..blocks.layout import ParamLayout
from .plan import StepPlan, cut_segments
from .shards import Cut, ShardMap


@dataclass(frozen=True)
class _Share:
    """This rank's part of one flat tensor in a buffer: ``slots[i]`` of the flat's sums is ``index[i]`` of the buffer."""

    flat: int
    slots: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class SyncStage:
    """One all-reduce: which sums of which flat tensors meet in a buffer of ``size`` floats over ``group``."""

    group: dist.ProcessGroup | None
    size: int
    shares: tuple[_Share, ...]

    def start(self, sums: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dist.Work]:
        """Starts the all-reduce of the flat tensors' sums; returns the buffer and the handle to wait for."""
        buffer = torch.zeros(self.size, dtype=torch.float32, device=sums[0].device)
        for share in self.shares:
            buffer[share.index] = sums[share.flat][share.slots]
        return buffer, dist.all_reduce(buffer, group=self.group, async_op=True)

    def finish(self, sums: Sequence[torch.Tensor], started: tuple[torch.Tensor, dist.Work]) -> None:
        """Waits, then writes the reduced sums back."""
        buffer, work = started
        work.wait()
        for share in self.shares:
            sums[share.flat][share.slots] = buffer[share.index]


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

    The order within a buffer follows ``shards.cuts`` (the same on all ranks), the parameter's pieces, and the segment's
    number, so ranks agree on it without talking. Every rank of a group takes part, also one that holds no cut segment.
    """
    over_shards = [
        _cut_stage(group, {name: cut for name, cut in shards.cuts.items() if cut.group is group}, plans, layouts)
        for group in dict.fromkeys(cut.group for cut in shards.cuts.values())]
    over_slices = [
        _split_stage(group, {name for name, split in shards.splits.items() if split.group is group}, plans)
        for group in dict.fromkeys(split.group for split in shards.splits.values())]
    return SegmentSync(tuple(s for s in over_shards if s.size), tuple(s for s in over_slices if s.size))


def _cut_stage(group: dist.ProcessGroup | None, cuts: Mapping[str, Cut], plans: Sequence[StepPlan],
               layouts: Mapping[str, ParamLayout]) -> SyncStage:
    places: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
    size = 0
    for name, cut in cuts.items():
        for piece in range(len(layouts[name].pieces)):
            segments = cut_segments(layouts[name], piece, cut.positions)
            if len(segments):
                places[name, piece] = (size, segments)
                size += len(segments)
    shares = []
    for flat, plan in enumerate(plans):
        slots, index = [], []
        for run in plan.runs:
            if (run.name, run.piece) not in places:
                continue
            base, segments = places[run.name, run.piece]
            low, high = np.searchsorted(segments, (run.first, run.first + run.count))
            slots.append(segments[low:high] - run.first + run.slot)
            index.append(np.arange(low, high) + base)
        shares += _share(flat, slots, index)
    return SyncStage(group, size, tuple(shares))


def _split_stage(group: dist.ProcessGroup, names: set[str], plans: Sequence[StepPlan]) -> SyncStage:
    shares, size = [], 0
    for flat, plan in enumerate(plans):
        slots = [np.arange(run.slot, run.slot + run.count) for run in plan.runs if run.name in names]
        count = sum(len(s) for s in slots)
        shares += _share(flat, slots, [np.arange(size, size + count)])
        size += count
    _agree(group, size)
    return SyncStage(group, size, tuple(shares))


def _agree(group: dist.ProcessGroup, size: int) -> None:
    """Raises on all ranks of a tensor-parallel group where they hold different numbers of split segments."""
    sizes: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(sizes, size, group=group)
    if len(set(sizes)) > 1:
        raise RuntimeError(f"the tensor-parallel ranks hold different shards of their slices ({sizes} segments), so "
                           f"Adam-mini cannot sum rows over them; use the local form (row_parallel_sums=False)")


def _share(flat: int, slots: list[np.ndarray], index: list[np.ndarray]) -> list[_Share]:
    if not sum(len(s) for s in slots):
        return []
    return [_Share(flat, torch.from_numpy(np.concatenate(slots)), torch.from_numpy(np.concatenate(index)))]
