"""``--block-metrics-interval``: figures per block type in Megatron's log, TensorBoard and Weights & Biases."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ..blocks import BlockError
from ..collective.errors import run_on_all_ranks
from ..measure import BlockMonitor
from .build import optimizers_of


class _Watched:
    """A Megatron optimizer's monitor, and how many iterations are done."""

    def __init__(self, optimizer: Any, model: Any, every: int) -> None:
        self.done = 0
        self.monitor = BlockMonitor(
            *optimizers_of(optimizer), every=every, steps_done=lambda: self.done, model=list(model)
        )


_watched: WeakKeyDictionary[Any, _Watched] = WeakKeyDictionary()


def before_step(arguments: Any, optimizer: Any, model: Any) -> None:
    """Watches the step that is about to be taken, where the flag asks for it.

    Args:
        arguments: Megatron's.
        optimizer, model: those that the step trains; the model as a list of chunks.

    Raises:
        BlockError: the optimizer is none of ours; on every rank.
    """
    every = getattr(arguments, "block_metrics_interval", None)
    if not every:
        return
    if optimizer not in _watched:
        _watched[optimizer] = run_on_all_ranks(
            lambda: _watch(optimizer, model, every), "starting --block-metrics-interval"
        )
    _watched[optimizer].done = arguments.curr_iteration


def after_step(arguments: Any, optimizer: Any) -> dict[str, float]:
    """The figures of the step that was taken, on every rank; none in the steps between."""
    found = _watched.get(optimizer)
    if found is None:
        return {}
    found.done = arguments.curr_iteration + 1
    return found.monitor.report() or {}


def _watch(optimizer: Any, model: Any, every: int) -> _Watched:
    if not optimizers_of(optimizer):
        raise BlockError(
            f"--block-metrics-interval {every} needs a blockwise optimizer; leave it out, or give --optimizer blockwise_adamw"
        )
    return _Watched(optimizer, model, every)
