"""What is called after each of an engine's optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from deepspeed.pipe import PipelineModule

from ..patches.instances import InstancePatch


def after_each_step(engine: Any, patch: InstancePatch, call: Callable[[], None]) -> None:
    """Has something called on every rank after each step that ends an accumulation, by a patch that is the caller's own."""
    name = "train_batch" if isinstance(engine.module, PipelineModule) else "step"
    upstream = getattr(engine, name)
    watched = weakref.proxy(engine)

    def stepped(*arguments: Any, **options: Any) -> Any:
        before = watched.global_steps
        result = upstream(*arguments, **options)
        if watched.global_steps != before:
            call()
        return result

    patch.apply(engine, **{name: stepped})
