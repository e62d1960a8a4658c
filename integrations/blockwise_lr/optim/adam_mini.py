"""Adam-mini with one learning rate per block type, exact under any sharding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import BlockError, BlockMap, ParamLayout
from ..checkpoint.units import UnitMoments
from ..kernels import StepValues
from ..plan.shards import Fragment, ShardMap, split_at_replica_boundaries
from ..plan.step_plan import StepPlan, element_biases, segment_plan, slot_numel
from ..rules.options import AdamMiniOptions
from .base import BlockwiseOptimizer
from .segment_sync import SegmentSync, sync_of
from .tensors import row


class BlockwiseAdamMini(BlockwiseOptimizer):
    r"""Adam-mini (arXiv 2406.16793) with one learning rate per block type; all ratios 1 give plain Adam-mini.

    Adam-mini keeps one second moment per *segment*, the mean of its squared gradients, instead of one per element:

    ==============  ========================================  ===============================================
    block           segment                                   source
    ==============  ========================================  ===============================================
    embedding, head a token's row                             paper's partition; official embd_names, output_names
    q, k            a head                                    paper's partition; official wqk_names (k by its own
                                                              heads under grouped-query attention)
    v, o, ffn       an output neuron's row                    paper's partition; official wv_names,
                                                              attn_proj_names, mlp_names
    router, ssm     an output row                             not in the paper; as other linear layers
    norm            the whole vector                          official v1.1.1, "other blocks"
    bias            an element, or the vector                 official v1.1.1 uses plain Adam for biases
    ==============  ========================================  ===============================================

    Rows and heads are those of the unfused model wherever fused weights keep them, and a segment that shard edges or
    tensor parallelism cut keeps one second moment: its parts' sums of squares are added over the ranks by one small
    all-reduce per process group and step, started before and awaited after the step of all whole segments.

    The state per tensor is ``exp_avg`` (its shape) and ``exp_avg_sq`` (segments of this shard,). During a step it needs
    memory for one float per segment and, in the reference kernel, three tiles of 4 MiB, or of the largest segment.

    Args:
        params, lr, betas, eps, weight_decay, block_map, block_lr_ratios, block_weight_decay, decay_norms_and_biases,
        min_lr, block_rules, kernel, accept_mismatch, ratio_fade_steps: as for :class:`~blockwise_lr.BlockwiseAdamW`. A
            block_map that knows the number of heads is needed (``map_blocks(model)`` of a model with a config).
        bias_segments: "element" (the default: as the official code, at a cost of memory that cannot be measured, and a
            fused bias of q, k and v needs no sums over ranks) or "vector" (one per bias vector).

    Raises:
        BlockError: as BlockwiseAdamW, and where the number of heads is not known.
    """

    Options = AdamMiniOptions

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        block_map: BlockMap | None = None,
        block_lr_ratios: Mapping[str, float] | None = None,
        block_weight_decay: Mapping[str, float] | None = None,
        decay_norms_and_biases: bool = False,
        min_lr: float | None = None,
        bias_segments: str = "element",
        block_rules: Iterable[dict] | None = None,
        kernel: str = "auto",
        accept_mismatch: Iterable[str] = (),
        ratio_fade_steps: int = 0,
    ) -> None:
        self._sync: SegmentSync | None = None
        self._prereduced: dict[
            int, torch.Tensor
        ] = {}  # sums that prereduce_segment_sums has reduced, by id of the flat tensor
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                block_lr_ratios=block_lr_ratios,
                block_weight_decay=block_weight_decay,
                decay_norms_and_biases=decay_norms_and_biases,
                min_lr=min_lr,
                bias_segments=bias_segments,
                block_rules=block_rules,
                kernel=kernel,
                accept_mismatch=accept_mismatch,
                ratio_fade_steps=ratio_fade_steps,
            ),
            block_map=block_map,
        )

    def _forget_tensors(self) -> None:
        super()._forget_tensors()
        self._sync, self._prereduced = None, {}
        self._cut_slots: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._units: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _check_layout(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.is_complex():
            raise BlockError(f"{name} is complex, of which Adam-mini's segments are not defined; use BlockwiseAdamW")
        super()._check_layout(name, tensor)

    def layout_of(self, name: str) -> ParamLayout:
        layout = super().layout_of(name)
        return element_biases(layout) if self.bias_segments == "element" else layout

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        splits = self.shards.splits if self.shards is not None else {}
        return segment_plan(numel, fragments, layouts, parts={name: split.parts for name, split in splits.items()})

    def attach_shards(self, shards: ShardMap) -> None:
        shards = split_at_replica_boundaries(shards, self.layout_of)
        super().attach_shards(shards)
        self._cut_slots, self._units = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        layouts = {name: self.layout_of(name) for name in {*shards.boundaries, *shards.splits}}
        self._sync = sync_of(shards, [self.plan_of(tensor) for tensor, _ in shards.flats], layouts)

    @property
    def segment_plans(self) -> bool:
        return True

    def all_reduce_shared(self, sums: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Adds the sums of cut segments over the ranks that share them, in place.

        Args:
            sums: per id of a flat tensor, (its plan's slots,), float32. Every rank of the groups must call it.
        """
        if self._sync is not None:
            ordered = self._in_order(sums)
            self._sync.finish(ordered, self._sync.start(ordered))
        return sums

    def _second_moment(self, tensor: torch.Tensor) -> torch.Tensor:
        slots = torch.zeros(self.plan_of(tensor).slots, dtype=torch.float32, device=tensor.device)
        return self.unit_moments(tensor).placed(slots) if isinstance(tensor, DTensor) else slots

    def unit_moments(self, tensor: torch.Tensor) -> UnitMoments:
        found = self._units.get(tensor)
        if found is None:
            found = self._units[tensor] = super().unit_moments(tensor)
        return found

    def second_numel(self, tensor: torch.Tensor) -> int:
        return self.unit_moments(tensor).numel if isinstance(tensor, DTensor) else self.plan_of(tensor).slots

    def _taken_second(self, tensor: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
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
        self._prereduced = self.all_reduce_shared(self._partial_sums(grads))

    @property
    def has_prereduced_sums(self) -> bool:
        """Whether prereduce_segment_sums's sums wait for tensors that are still to be stepped."""
        return bool(self._prereduced)

    def _partial_sums(self, grads: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> dict[int, torch.Tensor]:
        sums = {}
        for p, grad, factor in grads:
            plan = self.plan_of(p)
            sums[id(p)] = torch.zeros(plan.slots, dtype=torch.float32, device=p.device)
            if len(plan.shared):
                self._kernel(p).sum_squares(row(grad), plan.shared, sums[id(p)])
                if factor != 1:
                    sums[id(p)].mul_(factor * factor)
        return sums

    def _in_order(self, sums: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """The sums of all attached flat tensors, zeros for those without a gradient: their rank takes part too."""
        for tensor, _ in self.shards.flats:
            if id(tensor) not in sums:
                sums[id(tensor)] = torch.zeros(self.plan_of(tensor).slots, dtype=torch.float32, device=tensor.device)
        return [sums[id(tensor)] for tensor, _ in self.shards.flats]

    # ---- the step

    def _step(self, work: list[tuple[torch.Tensor, StepValues]]) -> None:
        sums, started = self._prereduced, None
        reduce_now = not self._prereduced
        if reduce_now:
            sums = self._partial_sums([(p, p.grad, 1.0) for p, _ in work])
            started = self._sync and self._sync.start(self._in_order(sums))
        for p, values in work:
            with self._rows(p) as (param, grad, exp_avg), self._slots(p) as slots:
                self._kernel(p).adam_mini(param, grad, exp_avg, slots, self.plan_of(p), values, self.copy_of(p))
        if reduce_now and self._sync is not None:
            self._sync.finish(self._in_order(sums), started)
        for p, values in work:
            self._step_cut(p, sums.pop(id(p)), values)

    @contextmanager
    def _slots(self, p: torch.Tensor) -> Iterator[torch.Tensor]:
        """The second moment as kernels take it, a value per segment."""
        state = self.state[p]["exp_avg_sq"]
        if not isinstance(p, DTensor):
            yield state
            return
        units = self.unit_moments(p)
        slots = units.slots(state)
        yield slots
        units.write(state, slots)

    def _step_cut(self, p: torch.Tensor, sums: torch.Tensor, values: StepValues) -> None:
        plan = self.plan_of(p)
        if not len(plan.shared):
            return
        if p not in self._cut_slots:
            slots, numel = slot_numel(plan.shared)
            self._cut_slots[p] = (torch.from_numpy(slots).to(p.device), torch.from_numpy(numel).to(p.device))
        slots, numel = self._cut_slots[p]
        with self._rows(p) as (param, grad, exp_avg), self._slots(p) as moments:
            moments[slots] = moments[slots] * values.beta2 + sums[slots] / numel * (1 - values.beta2)
            self._kernel(p).adam_mini_presummed(param, grad, exp_avg, moments, plan, values, self.copy_of(p))
