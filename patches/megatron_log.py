"""megatron.training: each block type's learning rate, and its figures, in Megatron's log, TensorBoard and Weights & Biases.

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
    """What is logged.

    Attributes:
        rates: the learning rates that a Megatron optimizer uses now, by block type; empty for one that is not ours.
        before_step: told (Megatron's arguments, optimizer, the model's chunks) before a step.
        after_step: (Megatron's arguments, optimizer) -> figures of the step, by ``name/block type``; on every rank.
        judge: told (Megatron's arguments, optimizer, scheduler, the step's losses, those figures) last; losses are those of
            the batch by Megatron's names, on the last pipeline stage; none elsewhere, or where the step was skipped.
    """

    rates: Callable[[Any], Mapping[str, Sequence[float]]]
    before_step: Callable[[Any, Any, Any], None] = lambda *_: None
    after_step: Callable[[Any, Any], Mapping[str, float]] = lambda *_: {}
    judge: Callable[[Any, Any, Any, Mapping[str, Any], Mapping[str, float]], None] = lambda *_: None


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.training import global_vars, training

    step, log = training.train_step, training.training_log
    of_step = _signature(step, "model", "optimizer", "opt_param_scheduler")
    of_log = _signature(log, "iteration")
    trained: list[Any] = [lambda: None]  # the optimizer of the last step, weakly: a process may have several models
    figures: list[Mapping[str, float]] = [{}]  # of the last step

    @functools.wraps(step)
    def train_step(*arguments: Any, **keywords: Any) -> Any:
        given, settings = of_step.bind(*arguments, **keywords).arguments, global_vars.get_args()
        optimizer = given["optimizer"]
        trained[0] = weakref.ref(optimizer)
        hooks.before_step(settings, optimizer, given["model"])
        result = step(*arguments, **keywords)
        figures[0] = hooks.after_step(settings, optimizer)
        losses, is_skipped, *_ = result
        hooks.judge(settings, optimizer, given["opt_param_scheduler"], {} if is_skipped else losses, figures[0])
        return result

    @functools.wraps(log)
    def training_log(*arguments: Any, **keywords: Any) -> Any:
        result = log(*arguments, **keywords)
        iteration = of_log.bind(*arguments, **keywords).arguments["iteration"]
        rates = hooks.rates(trained[0]())
        settings, writer = global_vars.get_args(), global_vars.get_tensorboard_writer()
        wandb, scalars = global_vars.get_wandb_writer(), {}
        if rates and iteration % settings.log_interval == 0:
            shown = " | ".join(f"{block}: {_shown(values)}" for block, values in rates.items())
            training.print_rank_last(f" iteration {iteration} learning rates | {shown} |")
        if iteration % settings.tensorboard_log_interval == 0:
            for block, values in rates.items():
                for number, lr in enumerate(values):
                    part = f"-{number}" if len(values) > 1 else ""
                    scalars[f"learning-rate/{block}{part}"] = lr
        for line in _lines(figures[0]):
            training.print_rank_last(f" iteration {iteration} {line} |")
        scalars.update({f"blocks/{name}": value for name, value in figures[0].items()})
        for name, value in scalars.items() if writer else ():
            writer.add_scalar(name, value, iteration)
        if wandb and scalars:
            wandb.log(scalars, iteration)
        return result

    undo.set(training, "train_step", train_step)
    undo.set(training, "training_log", training_log)


def _signature(function: Any, *parameters: str) -> inspect.Signature:
    signature = inspect.signature(function)
    for parameter in (name for name in parameters if name not in signature.parameters):
        raise PatchError(
            f"patch 'megatron-log': {function.__name__} takes no {parameter}; install a version the patch was "
            f"written for (see `blockwise-lr doctor`)"
        )
    return signature


def _lines(figures: Mapping[str, float]) -> list[str]:
    """A line for each kind of figure, with all block types."""
    kinds: dict[str, list[str]] = {}
    for name, value in figures.items():
        kind, _, block = name.partition("/")
        kinds.setdefault(kind, []).append(f"{block}: {value:.4E}")
    return [f"{kind} | {' | '.join(shown)}" for kind, shown in kinds.items()]


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
        Symbol("megatron.training.global_vars:get_wandb_writer"),
    ),
    why="Megatron logs a single learning rate",
    until="Megatron logs the learning rate of every parameter group",
    install=_install,
    hooks=Hooks,
)
