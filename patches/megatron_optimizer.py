"""megatron-core: our optimizers where ``get_megatron_optimizer`` would build its Adam.

Megatron builds a closed list of optimizers inside one function and then wraps them (distributed, mixed precision or
plain). The wrapping stays Megatron's own. Its registry of emerging optimizers (0.19) would be the official hook, but does
not go with the element-sharded DistributedOptimizer. Optimizers that are not ours are built as before.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from .base import Patch, Symbol, Undo

_MODULE = "megatron.core.optimizer:"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer."


def _install(undo: Undo) -> None:
    from megatron.core import optimizer as module
    from megatron.core.optimizer import distrib_optimizer

    from blockwise_lr.megatron.build import build
    from blockwise_lr.megatron.settings import KINDS, settings_of
    from blockwise_lr.optim.base import BlockwiseOptimizer

    original = module._get_megatron_optimizer_based_on_param_groups

    @functools.wraps(original)
    def based_on_param_groups(config: Any, model_chunks: Any, param_groups: Any, **arguments: Any) -> Any:
        settings = settings_of(config)
        if settings is None:
            return original(config=config, model_chunks=model_chunks, param_groups=param_groups, **arguments)
        return build(original, settings, config, model_chunks, param_groups, **arguments)

    undo.set(module, "_get_megatron_optimizer_based_on_param_groups", based_on_param_groups)
    # 0.16's DistributedOptimizer asserts isinstance(optimizer, (Adam, …)) and uses the name for nothing else
    undo.set(distrib_optimizer, "Adam", (distrib_optimizer.Adam, BlockwiseOptimizer))
    if hasattr(module, "_get_megatron_emerging_optimizer"):
        _keep_from_emerging(undo, module, KINDS)


def _keep_from_emerging(undo: Undo, module: Any, kinds: Any) -> None:
    """0.19 takes every name but adam and sgd for an emerging optimizer; ours go on as Adams do."""
    from blockwise_lr.megatron.settings import settings_of

    emerging = module._get_megatron_emerging_optimizer

    @functools.wraps(emerging)
    def build_emerging(config: Any, model_chunks: Any, config_overrides: Any = None, pg_collection: Any = None) -> Any:
        if config.optimizer not in kinds:
            return emerging(
                config=config, model_chunks=model_chunks, config_overrides=config_overrides, pg_collection=pg_collection
            )
        as_adam = copy.copy(config)
        as_adam.optimizer, as_adam.blockwise = "adam", settings_of(config)
        return module.get_megatron_optimizer(
            as_adam, model_chunks, config_overrides, pg_collection is None and _has_gloo_groups(), pg_collection
        )

    undo.set(module, "_get_megatron_emerging_optimizer", build_emerging)


def _has_gloo_groups() -> bool:
    """Whether parallel_state made gloo groups; the caller's wish is not among what an emerging optimizer is given."""
    from megatron.core import parallel_state

    try:
        return parallel_state.get_data_parallel_group_gloo(True, True) is not None
    except AssertionError:
        return False


PATCH = Patch(
    name="megatron-optimizer",
    package="megatron-core",
    versions=">=0.16,<0.20",
    symbols=(
        Symbol(_MODULE + "_get_megatron_optimizer_based_on_param_groups"),
        Symbol(_MODULE + "Adam"),
        Symbol(_MODULE + "USING_PYTORCH_OPTIMIZER"),
        Symbol("megatron.core.optimizer.distrib_optimizer:Adam"),
        Symbol(_DISTRIBUTED + "_get_model_param_range_map", ("self", "param")),
        Symbol("megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params"),
        Symbol("megatron.core.optimizer.optimizer:FP32Optimizer"),
        Symbol("megatron.core.parallel_state:get_pipeline_model_parallel_group"),
        Symbol("megatron.core.parallel_state:get_tensor_model_parallel_group"),
        # checkpoints go through these: see blockwise_lr.megatron.checkpoint
        Symbol(_DISTRIBUTED + "_get_main_param_and_optimizer_states", ("self", "model_param")),
        Symbol(_DISTRIBUTED + "_set_main_param_and_optimizer_states", ("self", "model_param", "tensors")),
        *(
            Symbol(f"{_DISTRIBUTED}load_parameter_state_from_{form}")
            for form in ("dp_zero", "dp_reshardable", "fully_reshardable", "fs_model_space")
        ),
    ),
    why="the optimizers Megatron can build are a closed list inside one function",
    until="Megatron takes an optimizer class or factory that works with its DistributedOptimizer",
    install=_install,
)
