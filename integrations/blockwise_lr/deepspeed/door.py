"""Which patches the DeepSpeed door needs, and what they put in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..collective.errors import run_on_all_ranks
from ..optim.base import BlockwiseOptimizer
from ..patches import (
    deepspeed_checkpoint,
    deepspeed_gathers,
    deepspeed_megatron_mpu,
    deepspeed_ranks,
    deepspeed_timeouts,
    deepspeed_types,
)
from .agreement import compare_made, compare_ranks, is_callable
from .build import OPTIMIZER_TYPES, build_optimizer
from .checkpoint import is_ours, load, save
from .engine import attach, check_built
from .names import SCHEDULER_TYPES
from .universal_loading import model_state_files


def apply_patches() -> Callable[[], None]:
    """Applies the patches of DeepSpeed, in force for all engines of the process; returns their undo.

    They stay process-wide because DeepSpeed keeps its lists of types, and its engine's methods, as module and class
    attributes. Engines with other optimizers go DeepSpeed's own way through each of them.
    """
    undos = [
        deepspeed_types.PATCH.apply(_TYPES),
        deepspeed_ranks.PATCH.apply(_RANKS),
        deepspeed_megatron_mpu.PATCH.apply(),
        deepspeed_checkpoint.PATCH.apply(_CHECKPOINT),
        deepspeed_timeouts.PATCH.apply(),
        deepspeed_gathers.PATCH.apply(),
    ]

    def undo() -> None:
        for step in reversed(undos):
            step()

    return undo


def _build(name: str, engine: Any, model_parameters: Any) -> BlockwiseOptimizer:
    made = build_optimizer(name, engine.module, model_parameters, engine.optimizer_params() or {})
    compare_made(made, engine.module, engine.mpu)
    return made


def _make(make: Callable[[Any], Any], engine: Any, model_parameters: Any) -> Any:
    made = run_on_all_ranks(lambda: make(model_parameters), "building the optimizer")
    compare_made(made, engine.module, engine.mpu)
    return made


def _before(given: Mapping[str, Any]) -> None:
    compare_ranks(
        given["args"],
        given["model"],
        given["optimizer"],
        given["lr_scheduler"],
        given["mpu"],
        given["config_class"],
        given["mesh_device"],
    )


def _configure_scheduler(engine: Any, configure: Callable[[], None]) -> None:
    if is_ours(engine):
        run_on_all_ranks(configure, "building the learning rate scheduler")
    else:
        configure()


_TYPES = deepspeed_types.Hooks(
    optimizer_types=OPTIMIZER_TYPES,
    scheduler_types=SCHEDULER_TYPES,
    is_callable=is_callable,
    build=_build,
    make=_make,
    wrapping=BlockwiseOptimizer.holding_steps,
    attach=attach,
)
_RANKS = deepspeed_ranks.Hooks(before=_before, after=check_built, configure_scheduler=_configure_scheduler)
_CHECKPOINT = deepspeed_checkpoint.Hooks(is_ours=is_ours, save=save, load=load, model_state_files=model_state_files)
