"""DeepSpeed: ranks are compared before an engine's first collective, and hear of each other's schedulers' errors.

An engine starts with broadcasts of the model's parameters, in which ranks with another model hang, and never compares
settings. Engines with other optimizers go on as before; for them it is one small exchange when they are built.
"""

from __future__ import annotations

import functools
from typing import Any

from .base import Patch, Symbol, Undo

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine."


def _install(undo: Undo) -> None:
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine

    from blockwise_lr.collective.errors import run_on_all_ranks
    from blockwise_lr.deepspeed.agreement import compare_ranks
    from blockwise_lr.optim.base import BlockwiseOptimizer

    init = DeepSpeedEngine.__init__
    configure = DeepSpeedEngine._configure_lr_scheduler
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        of = given.arguments
        compare_ranks(
            of["args"],
            of["model"],
            of["optimizer"],
            of["lr_scheduler"],
            of["mpu"],
            of["config_class"],
            of["mesh_device"],
        )
        init(self, *args, **kwargs)

    def _configure_lr_scheduler(self: Any) -> None:
        if isinstance(self.basic_optimizer, BlockwiseOptimizer):
            run_on_all_ranks(lambda: configure(self), "building the learning rate scheduler")
        else:
            configure(self)

    undo.set(DeepSpeedEngine, "__init__", __init__)
    undo.set(DeepSpeedEngine, "_configure_lr_scheduler", _configure_lr_scheduler)


PATCH = Patch(
    name="deepspeed-ranks",
    package="deepspeed",
    versions=">=0.19.8,<0.20",
    symbols=(
        Symbol(
            _ENGINE + "__init__",
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
        Symbol(_ENGINE + "_configure_lr_scheduler", ("self",)),
    ),
    why="DeepSpeed trusts that all ranks were given the same model and settings, and hangs or trains on where not",
    until="DeepSpeed compares models and settings over the ranks",
    install=_install,
)
