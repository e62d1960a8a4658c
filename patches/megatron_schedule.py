"""megatron-core: each block type's learning rate from Megatron's own schedule.

``OptimizerParamScheduler.get_lr`` knows a maximum and a minimum learning rate per parameter group. A parameter of several
block types (a fused QKV weight) is in one group only, so after each of the scheduler's steps this asks ``get_lr`` once more
per block type, with ratio times the group's maximum and the same minimum: all warm up to their own peak and decay to one
shared minimum, whatever the decay style. A block type whose peak is below the minimum stays at its peak, so that no rate
rises while the others decay. Groups of other optimizers are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_megatron import PACKAGE, VERSIONS

_SCHEDULER = "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler."


@dataclass(frozen=True)
class Hooks:
    """What a param group's block types are.

    Attributes:
        ratios: the ratios in force now, by block type; None for a group of another optimizer.
        state_rates: (group, block type -> learning rate): what the next step is to use.
        own_rates: (Megatron's optimizer, samples so far, peak, minimum, ratios) -> the base rate and those by block type, where
            a schedule of ours takes the place of ``get_lr``; None where not.
    """

    ratios: Callable[[Mapping[str, Any]], Mapping[str, float] | None]
    state_rates: Callable[[dict[str, Any], Mapping[str, float]], None]
    own_rates: Callable[..., tuple[float, Mapping[str, float]] | None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    original = OptimizerParamScheduler.step

    @functools.wraps(original)
    def step(self: Any, increment: int) -> None:
        original(self, increment)
        for group in self.optimizer.param_groups:
            ratios = hooks.ratios(group)
            if ratios:
                peak, low = group.get("max_lr", self.max_lr), group.get("min_lr", self.min_lr)
                # of 0.15's scale_lr_cond, with which its step multiplies; later always 1
                scale = group.get("lr_mult", 1.0)
                own = hooks.own_rates(self.optimizer, self.num_steps, peak, low, ratios)
                if own is not None:
                    group["lr"] = scale * own[0]
                    hooks.state_rates(group, {block: scale * rate for block, rate in own[1].items()})
                    continue
                peaks = {block: ratio * peak for block, ratio in ratios.items()}
                hooks.state_rates(
                    group,
                    {
                        block: scale * self.get_lr({**group, "max_lr": top, "min_lr": min(low, top)})
                        for block, top in peaks.items()
                    },
                )

    undo.set(OptimizerParamScheduler, "step", step)


PATCH = Patch(
    name="megatron-schedule",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol(_SCHEDULER + "step", ("self", "increment")),),
    reads=(Symbol(_SCHEDULER + "get_lr", ("self", "param_group")),),
    why="config_overrides set one learning rate per parameter, and a fused QKV weight has two block types",
    until="Megatron's overrides can address rows of a parameter",
    install=_install,
    hooks=Hooks,
)
