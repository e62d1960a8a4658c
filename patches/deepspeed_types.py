"""DeepSpeed: optimizer and scheduler types of ours in a ds_config.

DeepSpeed knows a closed list of optimizer names and otherwise looks into torch.optim, and it builds optimizers from
tensors without names. So this adds our names to its lookup, hands our builder the engine's module, and once DeepSpeed has
wrapped the optimizer tells it what the flat tensors hold. Engines with other optimizers go DeepSpeed's own way unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_deepspeed import ENGINE, PACKAGE, VERSIONS


@dataclass(frozen=True)
class Hooks:
    """What stands behind the types.

    Attributes:
        optimizer_types: name in a ds_config -> class.
        scheduler_types: the same for schedulers.
        is_callable: whether a client's optimizer is a function that makes one.
        build: (name, engine, model parameters) -> the optimizer of a ds_config's entry.
        make: (client's function, engine, model parameters) -> the optimizer that it makes.
        wrapping: entered while DeepSpeed wraps an optimizer.
        attach: told of an engine whose optimizer DeepSpeed has wrapped.
    """

    optimizer_types: Mapping[str, type]
    scheduler_types: Mapping[str, type]
    is_callable: Callable[[Any], bool]
    build: Callable[[str, Any, Any], Any]
    make: Callable[[Any, Any, Any], Any]
    wrapping: Callable[[], AbstractContextManager[Any]]
    attach: Callable[[Any], None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import utils

    is_supported = DeepSpeedEngine._is_supported_optimizer
    build = DeepSpeedEngine._configure_basic_optimizer
    configure = DeepSpeedEngine._configure_optimizer

    def _is_supported_optimizer(self: Any, optimizer_name: str) -> bool:
        return optimizer_name in hooks.optimizer_types or is_supported(self, optimizer_name)

    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        if self.optimizer_name() not in hooks.optimizer_types:
            return build(self, model_parameters)
        return hooks.build(self.optimizer_name(), self, model_parameters)

    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if hooks.is_callable(client_optimizer):  # made here, so that all ranks hear of an error, or of another class
            client_optimizer = hooks.make(client_optimizer, self, model_parameters)
        with hooks.wrapping():  # the fp16 wrapper takes a step on zero gradients while it is built
            configure(self, client_optimizer, model_parameters)
        hooks.attach(self)

    undo.set(DeepSpeedEngine, "_is_supported_optimizer", _is_supported_optimizer)
    undo.set(DeepSpeedEngine, "_configure_basic_optimizer", _configure_basic_optimizer)
    undo.set(DeepSpeedEngine, "_configure_optimizer", _configure_optimizer)
    for name, scheduler in hooks.scheduler_types.items():
        undo.set(lr_schedules, name, scheduler)
    for kind in hooks.optimizer_types.values():
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)
        undo.call(functools.partial(utils.ZERO_SUPPORTED_OPTIMIZERS.remove, kind))


PATCH = Patch(
    name="deepspeed-types",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(ENGINE + "._is_supported_optimizer", ("self", "optimizer_name")),
        Symbol(ENGINE + "._configure_basic_optimizer", ("self", "model_parameters")),
        Symbol(ENGINE + "._configure_optimizer", ("self", "client_optimizer", "model_parameters")),
        Symbol("deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS"),
    ),
    reads=(
        Symbol("deepspeed.runtime.lr_schedules:WarmupLR", why="beside it DeepSpeed looks for scheduler types"),
        Symbol(ENGINE + ".optimizer_name", ("self",)),
    ),
    why="DeepSpeed's list of optimizer types is closed, and it builds optimizers from tensors without names",
    until="DeepSpeed offers a registry of optimizer types that are given the module",
    install=_install,
    hooks=Hooks,
)
