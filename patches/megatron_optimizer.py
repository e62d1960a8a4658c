"""megatron-core: our optimizers where ``get_megatron_optimizer`` would build its Adam.

Megatron builds a closed list of optimizers inside one function and then wraps them (distributed, mixed precision or
plain). The wrapping stays Megatron's own. Its registry of emerging optimizers (0.19) would be the official hook, but does
not go with the element-sharded DistributedOptimizer. Optimizers that are not ours are built as before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol, symbols
from .upstream_megatron import DISTRIBUTED, FLOAT16, FLOAT32, PACKAGE, VERSIONS

_MODULE = "megatron.core.optimizer"


@dataclass(frozen=True)
class Hooks:
    """What is built, and when.

    Attributes:
        kinds: the names of ours in ``OptimizerConfig.optimizer``.
        optimizer_type: the base class of ours.
        settings_of: (OptimizerConfig) -> ours for it; None where it asks for another optimizer.
        attach_settings: (OptimizerConfig, settings): has settings_of find them there.
        build: (Megatron's function, settings, and its arguments) -> what it makes, with an optimizer of ours in it.
    """

    kinds: Container[str]
    optimizer_type: type
    settings_of: Callable[[Any], Any]
    attach_settings: Callable[[Any, Any], None]
    build: Callable[..., Any]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.core import optimizer as module
    from megatron.core.optimizer import distrib_optimizer

    original = module._get_megatron_optimizer_based_on_param_groups

    @functools.wraps(original)
    def based_on_param_groups(config: Any, model_chunks: Any, param_groups: Any, **arguments: Any) -> Any:
        settings = hooks.settings_of(config)
        if settings is None:
            return original(config=config, model_chunks=model_chunks, param_groups=param_groups, **arguments)
        return hooks.build(original, settings, config, model_chunks, param_groups, **arguments)

    undo.set(module, "_get_megatron_optimizer_based_on_param_groups", based_on_param_groups)
    # 0.16's DistributedOptimizer asserts isinstance(optimizer, (Adam, …)) and uses the name for nothing else
    undo.set(distrib_optimizer, "Adam", (distrib_optimizer.Adam, hooks.optimizer_type))
    if hasattr(module, "_get_megatron_emerging_optimizer"):
        _keep_from_emerging(undo, module, hooks)


def _keep_from_emerging(undo: Undo, module: Any, hooks: Hooks) -> None:
    """0.19 takes every name but adam and sgd for an emerging optimizer; ours go on as Adams do."""
    emerging = module._get_megatron_emerging_optimizer

    @functools.wraps(emerging)
    def build_emerging(config: Any, model_chunks: Any, config_overrides: Any = None, pg_collection: Any = None) -> Any:
        if config.optimizer not in hooks.kinds:
            return emerging(
                config=config, model_chunks=model_chunks, config_overrides=config_overrides, pg_collection=pg_collection
            )
        as_adam = copy.copy(config)
        hooks.attach_settings(as_adam, hooks.settings_of(config))
        as_adam.optimizer = "adam"
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


@contextlib.contextmanager
def in_place_of_adam(factory: Callable[..., Any]) -> Iterator[None]:
    """While Megatron builds one optimizer: its fused Adam is this factory, and no torch.optim class."""
    from megatron.core import optimizer as module

    undo = Undo()
    undo.set(module, "Adam", factory)
    undo.set(module, "USING_PYTORCH_OPTIMIZER", False)
    try:
        yield
    finally:
        undo()


PATCH = Patch(
    name="megatron-optimizer",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_MODULE + ":_get_megatron_optimizer_based_on_param_groups"),
        Symbol("megatron.core.optimizer.distrib_optimizer:Adam"),
        Symbol(
            _MODULE + ":_get_megatron_emerging_optimizer",
            ("config", "model_chunks", "config_overrides", "pg_collection"),
            versions=">=0.19",
        ),
        *symbols(_MODULE, "Adam", "USING_PYTORCH_OPTIMIZER", why="replaced while an optimizer of ours is built"),
    ),
    reads=(
        *(Symbol(path) for path in (DISTRIBUTED, FLOAT16, FLOAT32)),
        *symbols(_MODULE, "get_megatron_optimizer"),
        *symbols("megatron.core.parallel_state", "get_data_parallel_group_gloo"),
    ),
    why="the optimizers Megatron can build are a closed list inside one function",
    until="Megatron takes an optimizer class or factory that works with its DistributedOptimizer",
    install=_install,
    hooks=Hooks,
)
