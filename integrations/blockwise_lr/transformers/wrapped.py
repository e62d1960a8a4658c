"""The blockwise optimizer that a Trainer's callbacks look for."""

from __future__ import annotations

from typing import Any

from ..blocks import BlockError
from ..optim.base import BlockwiseOptimizer


def blockwise_optimizer(optimizer: Any, who: str) -> BlockwiseOptimizer:
    """Of what a Trainer tells its callbacks: the one inside Accelerate's wrapper, and DeepSpeed's.

    Args:
        optimizer: the callback's.
        who: the callback's name, for the error.

    Raises:
        BlockError: there is none.
    """
    inner = optimizer
    while inner is not None and not isinstance(inner, BlockwiseOptimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise BlockError(
            f"{who} needs a blockwise optimizer, and the Trainer has {type(optimizer).__name__}; give "
            f"optimizer_cls_and_kwargs=(BlockwiseAdamWFactory, {{...}}), or the type in the ds_config"
        )
    return inner
