"""From a ds_config's optimizer entry to an optimizer of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..blocks.presets import ANY_SIZE
from ..collective.errors import run_on_all_ranks
from ..optim import CLASSES
from ..optim.base import BlockwiseOptimizer
from .stages import map_engine_module

OPTIMIZER_TYPES: Mapping[str, type[BlockwiseOptimizer]] = CLASSES
_MAPPING_KEYS = ("block_rules", "block_strict")


def build_optimizer(
    kind: str, module: torch.nn.Module, model_parameters: Iterable[Any], settings: Mapping[str, Any]
) -> BlockwiseOptimizer:
    """The optimizer of a ds_config's ``"optimizer": {"type": kind, "params": settings}``.

    Args:
        kind: a key of OPTIMIZER_TYPES.
        module: the engine's module; names and head counts are read from it.
        model_parameters: tensors or param groups, as DeepSpeed passes them on from the user.
        settings: the arguments of the optimizer's class, ``block_rules`` and ``block_strict``.

    Raises:
        BlockError: an unknown setting, a bad value, a parameter that no rule maps, on any rank; all ranks raise.
    """
    return run_on_all_ranks(lambda: _build(kind, module, model_parameters, settings), f"building {kind}")


def _build(
    kind: str, module: torch.nn.Module, model_parameters: Iterable[Any], settings: Mapping[str, Any]
) -> BlockwiseOptimizer:
    cls = OPTIMIZER_TYPES[kind]
    options = cls.Options.checked(settings, f"optimizer {kind}: ", config=ANY_SIZE)
    block_map = map_engine_module(module, options.block_rules, options.block_strict)
    arguments = {key: value for key, value in settings.items() if key not in _MAPPING_KEYS}
    return cls(list(model_parameters), block_map=block_map, **arguments)
