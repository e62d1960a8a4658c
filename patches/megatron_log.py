"""megatron.training: each block type's learning rate in Megatron's log and TensorBoard.

Megatron logs one learning rate, that of the groups without overrides, which is the base learning rate here.
"""
from __future__ import annotations

import functools
import inspect
from typing import Any

from .base import Patch, PatchError, Symbol, Undo


def _install(undo: Undo) -> None:
    from megatron.training import global_vars, training

    from blockwise_lr.megatron.build import current_block_lrs

    original = training.training_log
    signature = inspect.signature(original)
    if "iteration" not in signature.parameters:
        raise PatchError("patch 'megatron-log': training_log takes no iteration; install a version the patch was written "
                         "for (see `blockwise-lr doctor`)")

    @functools.wraps(original)
    def training_log(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        iteration = signature.bind(*arguments, **keywords).arguments["iteration"]
        rates = current_block_lrs()
        settings, writer = global_vars.get_args(), global_vars.get_tensorboard_writer()
        if rates and iteration % settings.log_interval == 0:
            shown = " | ".join(f"{block}: {lr:.6E}" for block, lr in rates.items())
            training.print_rank_last(f" iteration {iteration} learning rates | {shown} |")
        if writer and iteration % settings.tensorboard_log_interval == 0:
            for block, lr in rates.items():
                writer.add_scalar(f"learning-rate/{block}", lr, iteration)
        return result

    undo.set(training, "training_log", training_log)


PATCH = Patch(
    name="megatron-log",
    package="megatron-core",
    versions=">=0.16,<0.20",
    symbols=(Symbol("megatron.training.training:training_log"), Symbol("megatron.training.training:print_rank_last")),
    why="Megatron logs a single learning rate",
    until="Megatron logs the learning rate of every parameter group",
    install=_install,
)
