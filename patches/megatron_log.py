"""megatron.training: each block type's learning rate in Megatron's log and TensorBoard.

Megatron logs one learning rate, that of the groups without overrides, which is the base learning rate here. Where param
groups with one block type follow several schedules (--use-mup), each one's rate is logged.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import PatchError, Symbol
from .upstream_megatron import PACKAGE, VERSIONS


@dataclass(frozen=True)
class Hooks:
    """``rates``: the learning rates that a Megatron optimizer uses now, by block type; empty for one that is not ours."""

    rates: Callable[[Any], Mapping[str, Sequence[float]]]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.training import global_vars, training

    step, log = training.train_step, training.training_log
    of_step, of_log = _signature(step, "optimizer"), _signature(log, "iteration")
    trained: list[Any] = [lambda: None]  # the optimizer of the last step, weakly: a process may have several models

    @functools.wraps(step)
    def train_step(*arguments: Any, **keywords: Any) -> Any:
        trained[0] = weakref.ref(of_step.bind(*arguments, **keywords).arguments["optimizer"])
        return step(*arguments, **keywords)

    @functools.wraps(log)
    def training_log(*arguments: Any, **keywords: Any) -> Any:
        result = log(*arguments, **keywords)
        iteration = of_log.bind(*arguments, **keywords).arguments["iteration"]
        rates = hooks.rates(trained[0]())
        settings, writer = global_vars.get_args(), global_vars.get_tensorboard_writer()
        if rates and iteration % settings.log_interval == 0:
            shown = " | ".join(f"{block}: {_shown(values)}" for block, values in rates.items())
            training.print_rank_last(f" iteration {iteration} learning rates | {shown} |")
        if writer and iteration % settings.tensorboard_log_interval == 0:
            for block, values in rates.items():
                for number, lr in enumerate(values):
                    part = f"-{number}" if len(values) > 1 else ""
                    writer.add_scalar(f"learning-rate/{block}{part}", lr, iteration)
        return result

    undo.set(training, "train_step", train_step)
    undo.set(training, "training_log", training_log)


def _signature(function: Any, parameter: str) -> inspect.Signature:
    signature = inspect.signature(function)
    if parameter not in signature.parameters:
        raise PatchError(
            f"patch 'megatron-log': {function.__name__} takes no {parameter}; install a version the patch was "
            f"written for (see `blockwise-lr doctor`)"
        )
    return signature


def _shown(rates: Sequence[float]) -> str:
    return " and ".join(f"{lr:.6E}" for lr in dict.fromkeys(rates))


PATCH = Patch(
    name="megatron-log",
    package=PACKAGE,
    versions=VERSIONS,
    needs="megatron.training",
    symbols=(Symbol("megatron.training.training:train_step"), Symbol("megatron.training.training:training_log")),
    reads=(
        Symbol("megatron.training.training:print_rank_last"),
        Symbol("megatron.training.global_vars:get_args"),
        Symbol("megatron.training.global_vars:get_tensorboard_writer"),
    ),
    why="Megatron logs a single learning rate",
    until="Megatron logs the learning rate of every parameter group",
    install=_install,
    hooks=Hooks,
)
