"""BlockMonitor: figures per block type of every so manieth optimizer step, taken while it is taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..blocks import BlockError
from ..blocks.types import shown
from ..collective import is_rank_zero
from ..optim.base import BlockwiseOptimizer
from ..optim.tensors import row
from ..plan.dtensor import local
from .loss_ratio import LossRatio
from .metrics import BlockSums, figures
from .sinks import Sink
from .stragglers import ForwardTimes


class BlockMonitor:
    """Watches an optimizer, and hands on the figures of every so manieth step.

    After each step call :meth:`report` on every rank. In the steps between it costs nothing but the call. The figures are
    those of :func:`~blockwise_lr.measure.block_metrics`, with

    - ``gradient_norm`` in every door, for gradients are read when the optimizer is given them (clipped by the framework, not
      yet by ``block_clip``);
    - ``update_rms`` and ``update_to_weight``: the root mean square of what the step changed, weight decay included, and its
      ratio to that of the weights;
    - ``forward_time/slowest``, the seconds of a step that the slowest rank spends in the model's forward passes,
      ``forward_time/to_median``, their ratio to the median of all ranks, and ``forward_time/rank``, which it is: where the
      model is given and there are several ranks. Of each rank the median of its steps since the last report counts. Under
      ZeRO-3, FSDP2 and tensor parallelism ranks wait for one another within a forward pass, and a slow one slows all alike;
    - ``loss_ratio``, ``loss_ratio_max`` and ``loss_ratio_share``, where losses are given: see
      :class:`~blockwise_lr.measure.LossRatio`.

    Args:
        optimizers: of one model: one, or all that Megatron chains.
        every: steps between two reports. A step that is reported needs a copy of this rank's weights (the fp32 ones, where
            there are such), for the size of the update.
        steps_done: steps that were taken before, where a run is resumed; or what tells how many are done, for loops that
            count (and have counted a step when they call :meth:`report`).
        updates: False: without the update's size, and its copy.
        sinks: each called as ``sink(figures, step)`` on rank 0.
        model: what the training loop calls (the model, its DDP wrapper, an engine), or several, to time their forward
            passes; a report is then collective over all ranks.

    Raises:
        BlockError: ``every`` below 1; or as :func:`~blockwise_lr.measure.block_metrics`.
    """

    def __init__(
        self,
        *optimizers: BlockwiseOptimizer,
        every: int = 100,
        steps_done: int | Callable[[], int] = 0,
        updates: bool = True,
        sinks: Iterable[Sink] = (),
        model: Any = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise BlockError(f"every is {shown(every)}; give a whole number of steps, 1 or above")
        self.every, self.updates = every, updates
        self._counts = steps_done if callable(steps_done) else None
        self._done = 0 if callable(steps_done) else steps_done
        self.sinks = list(sinks)
        self.loss_ratio = LossRatio()
        models = () if model is None else model if isinstance(model, list | tuple) else (model,)
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._sums: dict[int, BlockSums] = {}
        self._weights: dict[int, torch.Tensor] = {}  # before the step, by id of the tensor
        for optimizer in optimizers:
            BlockSums(optimizer)  # refuses before the first step
        self._times = ForwardTimes(models) if models else None
        self._hooks = [
            hook
            for optimizer in optimizers
            for hook in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]

    @property
    def steps_done(self) -> int:
        """Steps taken so far."""
        return self._done if self._counts is None else self._counts()

    @property
    def is_due(self) -> bool:
        """Whether the step after ``steps_done`` is one to report."""
        return (self.steps_done + 1) % self.every == 0

    def report(self, loss: float | None = None) -> dict[str, float] | None:
        """Ends a step. Collective as :func:`~blockwise_lr.measure.block_metrics`, in the steps that are reported.

        Args:
            loss: the step's, for the loss ratio; of all steps, or of none.

        Returns:
            The figures, also those that went to the sinks; None for a step in between.
        """
        self._done += 1
        step = self.steps_done
        ratio = None if loss is None else self.loss_ratio.add(loss)
        if self._times is not None:
            self._times.end_step()
        if step % self.every:
            return None
        every = [
            self._sums.get(id(found)) or BlockSums(found) for found in (ref() for ref in self._optimizers) if found
        ]
        for sums in every:
            sums.add_states()
        found = figures(every)
        self._sums, self._weights = {}, {}
        if self._times is not None:
            found.update(self._times.figures())
        if ratio is not None:
            found["loss_ratio"] = ratio
            found["loss_ratio_max"], found["loss_ratio_share"] = self.loss_ratio.largest, self.loss_ratio.share
        if is_rank_zero():
            for sink in self.sinks:
                sink(found, step)
        return found

    def close(self) -> None:
        """Watches no more."""
        for hook in self._hooks:
            hook.remove()
        if self._times is not None:
            self._times.close()
        self._sums, self._weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The steps and the loss ratio's numbers."""
        return {"steps_done": self.steps_done, "loss_ratio": self.loss_ratio.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a state was saved."""
        self._done = state["steps_done"]
        self.loss_ratio.load_state_dict(state["loss_ratio"])

    @torch.no_grad()
    def _before(self, optimizer: BlockwiseOptimizer, *_: Any) -> None:
        if not self.is_due:
            return
        if id(optimizer) not in self._sums:  # ZeRO steps its tensors one after another
            self._sums[id(optimizer)] = BlockSums(optimizer)
        sums = self._sums[id(optimizer)]
        for tensor in optimizer.all_tensors():
            if tensor.grad is not None:
                sums.add_gradient(tensor, tensor.grad)
                if self.updates:
                    self._weights[id(tensor)] = row(local(tensor)).clone()

    @torch.no_grad()
    def _after(self, optimizer: BlockwiseOptimizer, *_: Any) -> None:
        if not self.is_due:
            return
        for tensor in optimizer.all_tensors():
            before = self._weights.pop(id(tensor), None)
            if before is not None:
                self._sums[id(optimizer)].add_update(tensor, before.sub_(row(local(tensor))))
