"""DeepSpeed with ``mpu=megatron.core.parallel_state``: two functions that DeepSpeed asks of an mpu.

Megatron before its core had ``get_model_parallel_world_size`` and ``get_model_parallel_rank``, and DeepSpeed still calls
them; megatron.core.parallel_state has only the group. This adds both to an mpu that lacks them, when an engine is given
one.
"""

from __future__ import annotations

import functools
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_deepspeed import ENGINE, PACKAGE, VERSIONS


def _install(undo: Undo, _: None) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._configure_with_arguments

    @functools.wraps(original)
    def _configure_with_arguments(self: Any, args: Any, mpu: Any) -> None:
        if hasattr(mpu, "get_model_parallel_group") and not hasattr(mpu, "get_model_parallel_world_size"):
            undo.set(mpu, "get_model_parallel_world_size", lambda: mpu.get_model_parallel_group().size())
            undo.set(mpu, "get_model_parallel_rank", lambda: mpu.get_model_parallel_group().rank())
        original(self, args, mpu)

    undo.set(DeepSpeedEngine, "_configure_with_arguments", _configure_with_arguments)


PATCH = Patch(
    name="deepspeed-megatron-mpu",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol(ENGINE + "._configure_with_arguments", ("self", "args", "mpu")),),
    why="DeepSpeed asks an mpu for functions that megatron.core.parallel_state no longer has",
    until="DeepSpeed asks the mpu for its model-parallel group only",
    install=_install,
)
