"""Types and scheduler parameters of a ds_config: misspelt ones are told with the nearest right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from ..blocks import BlockError
from ..blocks.types import did_you_mean
from ..schedules import SCHEDULES, BlockwiseTokenCosine
from ..schedules.base import BlockwiseSchedule
from .build import OPTIMIZER_TYPES

# decay by tokens needs what counts them, which under Megatron is --lr-decay-tokens
SCHEDULER_TYPES: dict[str, type[BlockwiseSchedule]] = {**SCHEDULES, "BlockwiseTokenCosine": BlockwiseTokenCosine}
_OF_THE_ENGINE = ("self", "optimizer", "tokens")  # what DeepSpeed fills in


def meant(name: Any, known: Iterable[str]) -> str | None:
    """The one of our names that another name is a misspelling of; None for a name that is right, or somebody else's."""
    known = list(known)
    if not isinstance(name, str) or name in known:
        return None
    lowered = {own.lower(): own for own in known}
    is_ours = name.lower().startswith("blockwise")
    begun = [own for own in lowered if is_ours and own.startswith(name.lower())]  # of a name cut short
    close = begun or difflib.get_close_matches(name.lower(), lowered, 1, cutoff=0.0 if is_ours else 0.8)
    return lowered[close[0]] if close else None


def is_misspelt(config: Any) -> bool:
    """Whether a DeepSpeedConfig names an optimizer that is nearly one of ours."""
    return meant(config.optimizer_name, OPTIMIZER_TYPES) is not None


def check_names(config: Any) -> None:
    """Refuses misspelt types, and parameters that our schedulers do not have.

    Raises:
        BlockError: with the key, its value and what to write.
    """
    for key, name, known in (
        ("optimizer.type", config.optimizer_name, OPTIMIZER_TYPES),
        ("scheduler.type", config.scheduler_name, SCHEDULER_TYPES),
    ):
        right = meant(name, known)
        if right is not None:
            raise BlockError(f"{key} is {name!r}; did you mean {right!r}? Types of blockwise_lr: {', '.join(known)}")
    if config.scheduler_name in SCHEDULER_TYPES:
        _check_parameters(config.scheduler_name, config.scheduler_params or {})


def _check_parameters(name: str, given: Any) -> None:
    parameters = inspect.signature(SCHEDULER_TYPES[name]).parameters.values()
    valid = [one.name for one in parameters if one.name not in _OF_THE_ENGINE]
    needed = [one.name for one in parameters if one.name in valid and one.default is inspect.Parameter.empty]
    said = f"valid ones are {', '.join(valid)}"
    for key in given:
        if key not in valid:
            raise BlockError(f"scheduler.params: {name} has no parameter {key!r}{did_you_mean(key, valid)}; {said}")
    for key in needed:
        if key not in given:
            raise BlockError(f"scheduler.params: {name} needs {key}; {said}")
