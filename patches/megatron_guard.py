"""megatron-core: what a guard has seen and done is saved with ``OptimizerParamScheduler``, which every checkpoint holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_megatron import PACKAGE, VERSIONS

_SCHEDULER = "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler."
_KEY = "blockwise_lr_guard"


@dataclass(frozen=True)
class Hooks:
    """A scheduler's guard.

    Attributes:
        state: its state, as plain values; None where the scheduler has no guard.
        loaded: told the scheduler and the state in a checkpoint that it has loaded, or None.
    """

    state: Callable[[Any], Mapping[str, Any] | None]
    loaded: Callable[[Any, Mapping[str, Any] | None], None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    save, load = OptimizerParamScheduler.state_dict, OptimizerParamScheduler.load_state_dict

    @functools.wraps(save)
    def state_dict(self: Any) -> dict[str, Any]:
        state = hooks.state(self)
        return save(self) if state is None else {**save(self), _KEY: state}

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        hooks.loaded(self, state_dict.get(_KEY))

    undo.set(OptimizerParamScheduler, "state_dict", state_dict)
    undo.set(OptimizerParamScheduler, "load_state_dict", load_state_dict)


PATCH = Patch(
    name="megatron-guard",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_SCHEDULER + "state_dict", ("self",)),
        Symbol(_SCHEDULER + "load_state_dict", ("self", "state_dict")),
    ),
    why="Megatron's checkpoints have no place for what a training loop has seen",
    until="a checkpoint of Megatron's takes state of a user's own",
    install=_install,
    hooks=Hooks,
)
