"""Which rank is slow: each rank's time in the model's forward passes, which waits for no other rank where nothing is sharded
in them.

A step takes every rank equally long, for all wait for the slowest in its collectives, so whole steps tell nothing. The
forward passes of DDP, ZeRO-1 and 2, and of a pipeline's stage have no collective.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..optim.clipping import device_of


class _Moment(Protocol):
    """A point in the order of a device's work."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Any) -> float: ...


class _HostMoment:
    """The same of the CPU, whose work is done when it has been called."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Has nothing to wait for."""

    def elapsed_time(self, later: _HostMoment) -> float:
        return 1e3 * (later.seconds - self.seconds)


class ForwardTimes:
    """Times the forward passes of this rank in training, without making the host wait for the device.

    Args:
        modules: what is called: the model, wrapped as it is trained (an engine, a DDP module), or Megatron's chunks of it.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        self._began: dict[int, _Moment] = {}
        self._passes: list[tuple[_Moment, _Moment]] = []  # of the step that is being taken
        self._waiting: list[list[tuple[_Moment, _Moment]]] = []  # steps that the device may not have ended
        self._seconds: list[float] = []  # of the steps since the last report
        self._hooks = [
            hook
            for module in modules
            for hook in (module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end))
        ]

    def end_step(self) -> None:
        """Ends an optimizer step."""
        if self._passes:
            self._waiting.append(self._passes)
            self._passes = []
        self._read()

    def figures(self) -> dict[str, float]:
        """The slowest rank since the last call, by the names of :class:`~blockwise_lr.measure.BlockMonitor`.

        Empty where there is one rank, or none has timed a forward pass. Collective over all ranks: one all-reduce of a number
        for each.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return {}
        if self._waiting:
            self._waiting[-1][-1][1].synchronize()  # the report has waited for later work already
            self._read()
        times = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device_of([None]))
        if self._seconds:
            times[dist.get_rank()] = statistics.median(self._seconds)
        self._seconds = []
        dist.all_reduce(times)
        return slowest(times.tolist())

    def close(self) -> None:
        """Times no more."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: Any, _: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._began[id(module)] = self._moment(module)

    def _end(self, module: Any, *_: Any) -> None:
        began = self._began.pop(id(module), None)
        if began is not None:
            self._passes.append((began, self._moment(module)))

    def _moment(self, module: Any) -> _Moment:
        parameter = next(module.parameters(), None)
        if parameter is None or parameter.device.type != "cuda":
            return _HostMoment()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        while self._waiting and all(end.query() for _, end in self._waiting[0]):
            passes = self._waiting.pop(0)
            self._seconds.append(sum(began.elapsed_time(end) for began, end in passes) / 1e3)


def slowest(seconds: list[float]) -> dict[str, float]:
    """The figures of ranks' times; those of 0 have none."""
    timed = [time for time in seconds if time > 0]
    if not timed:
        return {}
    longest = max(timed)
    return {
        "forward_time/slowest": longest,
        "forward_time/to_median": longest / statistics.median(timed),
        "forward_time/rank": float(seconds.index(longest)),
    }
