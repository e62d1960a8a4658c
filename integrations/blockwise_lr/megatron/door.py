"""Which patches the Megatron door needs, what they put in place, and the settings that library users register."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..collective import roll_call
from ..optim.base import BlockwiseOptimizer
from ..patches import (
    megatron_arguments,
    megatron_guard,
    megatron_log,
    megatron_optimizer,
    megatron_schedule,
    megatron_sequence_length,
    megatron_token_decay,
    upstream_megatron,
)
from ..patches.symbols import has_module
from ..rules.param_groups import ratio_now, state_block_lrs
from . import guard, metrics
from .build import build, current_block_lrs
from .schedule import schedule_in
from .sequence_length import cut_batches, length_now, report, token_decay
from .settings import KINDS, BlockSettings, add_arguments, attach_settings, forget, remember, settings_of


@dataclass(frozen=True)
class Registration:
    """Settings that were registered, and the way back: call it to take the patches off and forget the settings.

    Attributes:
        settings: what was registered.
    """

    settings: BlockSettings
    _undo: Callable[[], None]

    def __call__(self) -> None:
        forget(self.settings)
        self._undo()

    def attach_to(self, config: Any) -> Any:
        """Has one OptimizerConfig built with these settings, whatever else is registered; returns the config.

        So two models of one process train with different settings.

        Raises:
            BlockError: the config names none of our optimizers.
        """
        attach_settings(config, self.settings)
        return config


def register(
    *,
    block_lr_ratios: str | Mapping[str, float | str] | None = None,
    block_weight_decay: Mapping[str, float] | None = None,
    block_rules: Iterable[Any] | None = None,
    block_strict: bool = True,
    row_parallel_sums: bool = True,
    kernel: str = "auto",
    accept_mismatch: Iterable[str] = (),
    ratio_fade_steps: int = 0,
    block_schedule: Mapping[str, Any] | None = None,
    block_clip: Mapping[str, float | str] | float | str | None = None,
    block_muon: Mapping[str, Any] | None = None,
) -> Registration:
    """Lets ``get_megatron_optimizer`` build ``OptimizerConfig(optimizer="blockwise_adamw")``, or another of ours.

    Call it before the optimizer is built. The settings are those of :class:`~blockwise_lr.megatron.BlockSettings`; lr,
    min_lr, betas, eps and weight_decay are OptimizerConfig's own. They hold for every config to which no others are
    attached (:meth:`Registration.attach_to`); a later call replaces them.

    The patches stay process-wide, for Megatron builds optimizers in module-level functions and schedules them in a class;
    they leave configs that name other optimizers to Megatron.

    Returns:
        What takes the patches back, and attaches the settings to single configs.

    Raises:
        BlockError: a bad setting.
        PatchError: a megatron-core that the patches were not written for.
    """
    given: dict[str, Any] = {  # of any type until BlockSettings has looked at it
        "block_lr_ratios": block_lr_ratios,
        "block_weight_decay": block_weight_decay,
        "block_rules": () if block_rules is None else block_rules,
        "block_strict": block_strict,
        "row_parallel_sums": row_parallel_sums,
        "kernel": kernel,
        "accept_mismatch": accept_mismatch,
        "ratio_fade_steps": ratio_fade_steps,
        "block_schedule": block_schedule,
        "block_clip": block_clip,
        "block_muon": block_muon,
    }
    settings = BlockSettings(**given)
    undo = apply_patches()
    remember(settings)
    return Registration(settings, undo)


def apply_patches() -> Callable[[], None]:
    """Applies the patches of megatron-core, and those of megatron.training where it is installed; returns their undo.

    Raises:
        PatchError: a megatron-core that this was not written for, or one that lacks what is read of it.
    """
    upstream_megatron.UPSTREAM.check()
    undos = [megatron_optimizer.PATCH.apply(_OPTIMIZER), megatron_schedule.PATCH.apply(_SCHEDULE)]
    undos += [megatron_token_decay.PATCH.apply(_DECAY), megatron_guard.PATCH.apply(_GUARD)]
    if has_module("megatron.training"):
        upstream_megatron.TRAINING.check()
        undos += [
            megatron_arguments.PATCH.apply(_ARGUMENTS),
            megatron_log.PATCH.apply(_LOG),
            megatron_sequence_length.PATCH.apply(_LENGTHS),
        ]

    def undo() -> None:
        for step in reversed(undos):
            step()

    return undo


def _ratios(group: Mapping[str, Any]) -> dict[str, float] | None:
    ratios = group.get("block_lr_ratios")
    return {block: ratio_now(group, block) for block in ratios} if ratios else None


def _own_rates(
    optimizer: Any, samples: int, peak: float, low: float, ratios: Mapping[str, float]
) -> tuple[float, Mapping[str, float]] | None:
    schedule = schedule_in(optimizer)
    return None if schedule is None else schedule.rates(samples, peak, low, ratios)


def _build(*given: Any, **arguments: Any) -> Any:
    guard.start(upstream_megatron.global_arguments())
    return build(*given, **arguments)


_OPTIMIZER = megatron_optimizer.Hooks(
    kinds=KINDS,
    optimizer_type=BlockwiseOptimizer,
    settings_of=settings_of,
    attach_settings=attach_settings,
    build=_build,
)
_SCHEDULE = megatron_schedule.Hooks(ratios=_ratios, state_rates=state_block_lrs, own_rates=_own_rates)
_ARGUMENTS = megatron_arguments.Hooks(add_arguments=add_arguments)
_GUARD = megatron_guard.Hooks(state=guard.state, loaded=guard.loaded)


def _before_step(arguments: Any, optimizer: Any, model: Any) -> None:
    roll_call.listen()  # from the first step on, this rank answers roll calls
    metrics.before_step(arguments, optimizer, model)
    guard.before_step(arguments, optimizer)


_LOG = megatron_log.Hooks(
    rates=current_block_lrs, before_step=_before_step, after_step=metrics.after_step, judge=guard.after_step
)
_LENGTHS = megatron_sequence_length.Hooks(length=length_now, cut=cut_batches, done=report)
_DECAY = megatron_token_decay.Hooks(place=token_decay)
