"""Which patches the Megatron door needs, and their application."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..patches import megatron_arguments, megatron_log, megatron_optimizer, megatron_schedule
from .settings import BlockSettings, remember


def register(
    *,
    block_lr_ratios: Mapping[str, float] | None = None,
    block_weight_decay: Mapping[str, float] | None = None,
    block_rules: Iterable[Any] | None = None,
    block_strict: bool = True,
    row_parallel_sums: bool = True,
    kernel: str = "auto",
    accept_mismatch: Iterable[str] = (),
    ratio_fade_steps: int = 0,
) -> Callable[[], None]:
    """Lets ``get_megatron_optimizer`` build ``OptimizerConfig(optimizer="blockwise_adamw" or "blockwise_adam_mini")``.

    Call it before the optimizer is built; a later call replaces the settings. They are those of
    :class:`~blockwise_lr.megatron.BlockSettings`; lr, min_lr, betas, eps and weight_decay are OptimizerConfig's own.

    Returns:
        What takes the patches back.

    Raises:
        BlockError: a bad setting.
        PatchError: a megatron-core that the patches were not written for.
    """
    remember(
        BlockSettings(
            block_lr_ratios=block_lr_ratios,
            block_weight_decay=block_weight_decay,
            block_rules=() if block_rules is None else block_rules,
            block_strict=block_strict,
            row_parallel_sums=row_parallel_sums,
            kernel=kernel,
            accept_mismatch=accept_mismatch,
            ratio_fade_steps=ratio_fade_steps,
        )
    )
    return apply_patches()


def apply_patches() -> Callable[[], None]:
    """Applies the patches of megatron-core, and those of megatron.training where it is installed; returns their undo."""
    patches = [megatron_optimizer.PATCH, megatron_schedule.PATCH]
    if importlib.util.find_spec("megatron.training") is not None:
        patches += [megatron_arguments.PATCH, megatron_log.PATCH]
    undos = [patch.apply() for patch in patches]

    def undo() -> None:
        for step in reversed(undos):
            step()

    return undo
