"""Gradient clipping with a norm for each block type, exact where gradients lie in shards.

Every block type's squares are summed over all its elements in the model, by one all-reduce of a few numbers per step (and per
process group that shards parameters); then its gradients are multiplied by min(1, limit / (norm + 1e-6)), as
torch.nn.utils.clip_grad_norm_ does for all together. What a framework clips globally is clipped before. A limit may be a
percentile of the block type's own last norms (:mod:`.clip_history`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..blocks.types import BlockType
from ..plan.step_plan import CLASS, StepPlan
from ..plan.views import runs_of, slots_of
from .clip_history import ClipHistory
from .tensors import is_row, row, write_back

_BLOCKS = {block: number for number, block in enumerate(BlockType)}


# (tensor, its gradient, factor)
Gradient = tuple[torch.Tensor, torch.Tensor, float]


def device_of(groups: Iterable[ProcessGroup | None]) -> torch.device:
    """Where a rank that holds nothing adds nothing to the others' sums."""
    return torch.device("cuda" if any("nccl" in dist.get_backend(group) for group in groups) else "cpu")


def gradients(tensors: Iterable[torch.Tensor]) -> list[Gradient]:
    """Those that tensors have, as they are."""
    return [(p, p.grad, 1.0) for p in tensors if p.grad is not None]


def _prepare(members: Sequence[tuple[BlockClip, Sequence[Gradient]]]) -> None:
    """Gives optimizers of one model that step one after another the norms of all their gradients."""
    norms: list[torch.Tensor] = []
    for clip, grads in members:
        for group, squares in clip._squares(grads).items():
            if group is not None:
                dist.all_reduce(squares, group=group)
            norms.append(squares.to(norms[0].device) if norms else squares)
    whole = torch.stack(norms).sum(0).sqrt()
    for clip, grads in members:
        clip._take(whole, grads)


class BlockClip:
    """The limits, and the factors of the step that is being taken.

    Args:
        limits: block type -> largest norm, or as "90%" a percentile of its own; block types not named are not clipped.
        plan_of: the step plan of one of the optimizer's tensors.
        group_of: the process group over which a tensor and its like on other ranks are disjoint parts; None: it is whole.
        groups: all such groups; this rank takes part in their sums whatever it has gradients for.
        counts: whether a tensor's squares are this rank's to count.
        param_groups: the optimizer's, which keep the norms that percentiles are of.

    Attributes:
        peers: of optimizers that step parts of one model one after another: what gives each one's BlockClip and gradients, in
            the same order on every rank. Empty: this one has all.
        norms: of the last step, in the order of BlockType.
    """

    def __init__(
        self,
        limits: Mapping[str, float | str],
        plan_of: Callable[[torch.Tensor], StepPlan],
        group_of: Callable[[torch.Tensor], ProcessGroup | None],
        groups: Sequence[ProcessGroup],
        counts: Callable[[torch.Tensor], bool],
        param_groups: Sequence[MutableMapping[str, Any]],
    ) -> None:
        self._limits = {_BLOCKS[BlockType(block)]: limit for block, limit in limits.items()}
        percentiles = {number: float(of.rstrip("%")) for number, of in self._limits.items() if isinstance(of, str)}
        self._history = ClipHistory(percentiles, param_groups) if percentiles else None
        self._plan_of, self._group_of, self._groups, self._counts = plan_of, group_of, groups, counts
        self._factors: torch.Tensor | None = None
        self._ready = False  # the factors are of the step that is being taken
        self._waiting: set[int] = set()  # ids of tensors whose step takes them
        self.peers: Sequence[Callable[[], tuple[BlockClip, Sequence[Gradient]]]] = ()
        self.norms: torch.Tensor | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether factors wait for tensors that are still to be stepped."""
        return self._ready

    def prepare(self, grads: Sequence[Gradient]) -> None:
        """Computes a step's factors for callers that step one tensor at a time; every rank must call it.

        Args:
            grads: (tensor, its gradient, factor): the gradient times the factor is what the step will be given.
        """
        _prepare([(self, grads)])

    def _take(self, norms: torch.Tensor, grads: Sequence[Gradient]) -> None:
        """The norms of a step that is about to be taken on these gradients."""
        if self._history is not None:
            self._history.add(norms)
        limits = torch.full_like(norms, torch.inf)
        for number, limit in self._limits.items():
            if isinstance(limit, str):
                assert self._history is not None
                limits[number] = self._history.limit(number)
            else:
                limits[number] = limit
        factors = (limits / (norms + 1e-6)).clamp(max=1.0)
        # a norm of inf or NaN makes NaN of what is clipped, as in torch, and of nothing else
        self._factors = torch.where(torch.isinf(limits), torch.ones_like(factors), factors)
        self.norms, self._ready = norms, True
        self._waiting = {id(tensor) for tensor, _, _ in grads}

    def _squares(self, grads: Sequence[Gradient]) -> dict[ProcessGroup | None, torch.Tensor]:
        """This rank's sums of squares, by the group that they are to be added over."""
        device = grads[0][1].device if grads else device_of(self._groups)
        sums = {group: torch.zeros(len(_BLOCKS), dtype=torch.float32, device=device) for group in (None, *self._groups)}
        for tensor, grad, factor in grads:
            if self._counts(tensor):
                self._add(sums[self._group_of(tensor)], self._plan_of(tensor), row(grad), factor)
        return sums

    def _add(self, squares: torch.Tensor, plan: StepPlan, grad: torch.Tensor, factor: float) -> None:
        for table in (plan.local.table, plan.shared.table):
            for rectangle in table:
                number = _BLOCKS[plan.classes[int(rectangle[CLASS])].block]
                if number in self._limits:
                    squares[number] += (runs_of(grad, rectangle).float() * factor).square().sum().to(squares.device)

    def apply(self, due: Sequence[torch.Tensor]) -> None:
        """Clips the gradients of tensors that are about to be stepped, in place; computes the factors if they are not there."""
        if not self._ready:
            _prepare([peer() for peer in self.peers] or [(self, gradients(due))])
        for p in due:
            if p.grad is None:
                continue
            flat = row(p.grad)
            for table in (self._plan_of(p).local.table, self._plan_of(p).shared.table):
                for rectangle in table:
                    number = _BLOCKS[self._plan_of(p).classes[int(rectangle[CLASS])].block]
                    if number in self._limits:
                        runs_of(flat, rectangle).mul_(self._of(number, flat))
            if not is_row(p.grad):
                write_back(p.grad, flat)
            self._waiting.discard(id(p))
        self._ready = bool(self._waiting)

    def scale_sums(self, plan: StepPlan, sums: torch.Tensor) -> None:
        """Squares of gradients, summed per segment before they are clipped, as they are after it."""
        if self._factors is None:
            return
        factors = torch.ones_like(sums)
        for rectangle in plan.shared.table:
            number = _BLOCKS[plan.classes[int(rectangle[CLASS])].block]
            slots_of(factors, rectangle).copy_(self._of(number, sums).square().expand_as(slots_of(factors, rectangle)))
        sums.mul_(factors)

    def _of(self, number: int, like: torch.Tensor) -> torch.Tensor:
        assert self._factors is not None
        return self._factors[number].to(like.device)
