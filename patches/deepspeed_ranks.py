"""DeepSpeed: ranks are compared before an engine's first collective, and hear of each other's schedulers' errors.

An engine starts with broadcasts of the model's parameters, in which ranks with another model hang, and never compares
settings. Engines with other optimizers go on as before; for them it is one small exchange when they are built.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_deepspeed import ENGINE, PACKAGE, VERSIONS


@dataclass(frozen=True)
class Hooks:
    """What is done at an engine's start.

    Attributes:
        before: given the arguments of DeepSpeedEngine by name, before its first collective.
        after: given the engine once it is built.
        configure_scheduler: (engine, DeepSpeed's way of building its scheduler): has to call it.
    """

    before: Callable[[Mapping[str, Any]], None]
    after: Callable[[Any], None]
    configure_scheduler: Callable[[Any, Callable[[], None]], None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    init = DeepSpeedEngine.__init__
    configure = DeepSpeedEngine._configure_lr_scheduler
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        hooks.before(given.arguments)
        init(self, *args, **kwargs)
        hooks.after(self)

    def _configure_lr_scheduler(self: Any) -> None:
        hooks.configure_scheduler(self, functools.partial(configure, self))

    undo.set(DeepSpeedEngine, "__init__", __init__)
    undo.set(DeepSpeedEngine, "_configure_lr_scheduler", _configure_lr_scheduler)


PATCH = Patch(
    name="deepspeed-ranks",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(
            ENGINE + ".__init__",
            (
                "self",
                "args",
                "model",
                "optimizer",
                "model_parameters",
                "training_data",
                "lr_scheduler",
                "mpu",
                "dist_init_required",
                "collate_fn",
                "config",
                "config_class",
                "mesh_device",
                "dont_change_device",
            ),
        ),
        Symbol(ENGINE + "._configure_lr_scheduler", ("self",)),
    ),
    why="DeepSpeed trusts that all ranks were given the same model and settings, and hangs or trains on where not",
    until="DeepSpeed compares models and settings over the ranks",
    install=_install,
    hooks=Hooks,
)
