"""Optimizers with a state per segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import BlockError, BlockMap, ParamLayout
from ..blocks.types import shown
from ..checkpoint.units import UnitMoments
from ..plan.shards import Fragment, ShardMap, split_at_replica_boundaries
from ..plan.step_plan import StepPlan, segment_plan, slot_numel
from ..rules.base import State
from .base import BlockwiseOptimizer, Due
from .segment_sync import SegmentSync, sync_of
from .tensors import row


class SegmentwiseOptimizer(BlockwiseOptimizer):
    """Base of the optimizers of rules with a state per segment, exact under any sharding.

    A segment that several shards or tensor-parallel ranks share has one state: its parts' sums of squares are added over the
    ranks by one small all-reduce per process group and step (:mod:`~blockwise_lr.optim.segment_sync`).
    """

    def _build(self, params: list[Any], given: Mapping[str, Any], block_map: BlockMap | None) -> None:
        if given.get("grad_power", 1) != 1:  # segments' sums are taken of gradients as they come
            raise BlockError(
                f"grad_power is {shown(given['grad_power'])}, which {type(self).__name__} does not offer; leave it out"
            )
        super()._build(params, given, block_map)

    def _forget_tensors(self) -> None:
        super()._forget_tensors()
        self._sync: SegmentSync | None = None
        self._prereduced: dict[int, torch.Tensor] = {}  # by id of the flat tensor
        self._shared_slots: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._units: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        splits = self.shards.splits if self.shards is not None else {}
        return segment_plan(numel, fragments, layouts, parts={name: split.parts for name, split in splits.items()})

    def attach_shards(self, shards: ShardMap) -> None:
        shards = split_at_replica_boundaries(shards, self.layout_of)
        super().attach_shards(shards)
        self._shared_slots, self._units = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        layouts = {name: self.layout_of(name) for name in {*shards.boundaries, *shards.splits}}
        self._sync = sync_of(shards, [self.plan_of(tensor) for tensor, _ in shards.flats], layouts)

    def all_reduce_shared(self, sums: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Adds the sums of cut segments over the ranks that share them, in place.

        Args:
            sums: per id of a flat tensor, (its plan's slots,), float32. Every rank of the groups must call it.
        """
        if self._sync is not None:
            ordered = self._in_order(sums)
            self._sync.finish(ordered, self._sync.start(ordered))
        return sums

    def _segment_state(self, tensor: torch.Tensor) -> torch.Tensor:
        slots = torch.zeros(self.plan_of(tensor).slots, dtype=torch.float32, device=tensor.device)
        return self.unit_moments(tensor).placed(slots) if isinstance(tensor, DTensor) else slots

    def unit_moments(self, tensor: torch.Tensor) -> UnitMoments:
        found = self._units.get(tensor)
        if found is None:
            found = self._units[tensor] = super().unit_moments(tensor)
        return found

    def _state_numel(self, tensor: torch.Tensor, plan: StepPlan) -> dict[State, int]:
        segments = self.unit_moments(tensor).numel if isinstance(tensor, DTensor) else plan.slots
        return {spec: segments if spec.per == "segment" else plan.numel for spec in self.rule.states}

    def _taken_segments(self, tensor: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
        slots = loaded.detach().reshape(-1).to(tensor.device, torch.float32, copy=True)
        return self.unit_moments(tensor).placed(slots) if isinstance(tensor, DTensor) else slots

    # ---- sums of cut segments

    def prereduce_segment_sums(self, grads: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        """Reduces the sums of all cut segments of a step at once, for callers that step one flat tensor at a time.

        Every rank of the groups must call it, before the first of the step's calls of :meth:`step`. Without it, each
        call of step reduces the sums of the tensors it steps.

        Args:
            grads: (flat tensor, its gradient, factor): the gradient times the factor is what step will be given. The
                gradient may have another shape or dtype than the tensor, but its elements in the same order.
        """
        self._prereduced = self.all_reduce_shared(self._partial_sums(grads, applied=False))
        for p, _, _ in grads:  # each is waited for, with sums or without
            self._prereduced.setdefault(id(p), torch.empty(0))

    @property
    def has_prereduced_sums(self) -> bool:
        """Whether prereduce_segment_sums's sums wait for tensors that are still to be stepped."""
        return bool(self._prereduced)

    def _partial_sums(
        self, grads: Sequence[tuple[torch.Tensor, torch.Tensor, float]], *, applied: bool = True
    ) -> dict[int, torch.Tensor]:
        """Sums per segment; ``applied``: the gradients are clipped already, where they are to be."""
        sums = {}
        for p, grad, factor in grads:
            plan = self.plan_of(p)
            if len(plan.shared):
                sums[id(p)] = torch.zeros(plan.slots, dtype=torch.float32, device=p.device)
                self._kernel(p).sum_squares(row(grad), plan.shared, sums[id(p)])
                if factor != 1:
                    sums[id(p)].mul_(factor * factor)
                if self.block_clip and not applied:
                    self.clip.scale_sums(plan, sums[id(p)])
        return sums

    def _in_order(self, sums: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """The sums of all attached flat tensors, zeros for those without a gradient: their rank takes part too."""
        for tensor, _ in self.attached_shards.flats:
            if id(tensor) not in sums:
                sums[id(tensor)] = torch.zeros(self.plan_of(tensor).slots, dtype=torch.float32, device=tensor.device)
        return [sums[id(tensor)] for tensor, _ in self.attached_shards.flats]

    # ---- the step

    def _step(self, due: Sequence[Due]) -> None:
        sums, started = self._prereduced, []
        reduce_now, shared = not self._prereduced, [one for one in due if len(one.plan.shared)]
        if reduce_now:
            sums = self._partial_sums([(p, p.grad, 1.0) for p, _, _ in shared if p.grad is not None])
            started = [] if self._sync is None else self._sync.start(self._in_order(sums))
        slots = {p: self._slots(p) for p, _, _ in due}
        self._step_rows(due, slots)
        if reduce_now and self._sync is not None:
            self._sync.finish(self._in_order(sums), started)
        if shared:
            self._step_shared(shared, slots, sums)
        for p, moments in slots.items():
            sums.pop(id(p), None)
            if isinstance(p, DTensor):
                self.unit_moments(p).write(self.state[p][self._segment_key], moments)

    def _slots(self, p: torch.Tensor) -> torch.Tensor:
        """The segment state as kernels take it, a value per segment of this rank's plan; of a DTensor it is a copy."""
        state = self.state[p][self._segment_key]
        return self.unit_moments(p).slots(state) if isinstance(p, DTensor) else state

    def _step_shared(
        self,
        due: Sequence[Due],
        slots: Mapping[torch.Tensor, torch.Tensor],
        sums: Mapping[int, torch.Tensor],
    ) -> None:
        """The segments that several ranks share, by their reduced sums."""
        for p, plan, values in due:
            moments = slots[p]
            if p not in self._shared_slots:
                places, numel = slot_numel(plan.shared)
                self._shared_slots[p] = (torch.from_numpy(places).to(p.device), torch.from_numpy(numel).to(p.device))
            places, numel = self._shared_slots[p]
            shared = moments[places]
            self.rule.next_moment(shared, sums[id(p)][places] / numel, values.scalars)
            moments[places] = shared
        self._step_rows(due, slots, presummed=True)
