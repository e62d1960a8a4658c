"""megatron-core: the learning rate's decay by tokens, where steps train on more and more of them.

``OptimizerParamScheduler`` counts samples. While it computes a rate after the warmup, its counter and its end are put where the
tokens trained on are between the warmup's end and the budget, in its own unit; what it saves stays samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_megatron import PACKAGE, VERSIONS

_SCHEDULER = "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler."


@dataclass(frozen=True)
class Hooks:
    """``place``: given a scheduler, its (steps, decay steps) by tokens; None where it is to count samples."""

    place: Callable[[Any], tuple[float, float] | None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    original = OptimizerParamScheduler.get_lr

    @functools.wraps(original)
    def get_lr(self: Any, param_group: dict) -> float:
        place = hooks.place(self)
        if place is None:
            return original(self, param_group)
        kept = self.num_steps, self.lr_decay_steps
        self.num_steps, self.lr_decay_steps = place
        try:
            return original(self, param_group)
        finally:
            self.num_steps, self.lr_decay_steps = kept

    undo.set(OptimizerParamScheduler, "get_lr", get_lr)


PATCH = Patch(
    name="megatron-token-decay",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol(_SCHEDULER + "get_lr", ("self", "param_group")),),
    why="Megatron decays by samples, however many tokens they have",
    until="Megatron decays by tokens",
    install=_install,
    hooks=Hooks,
)
