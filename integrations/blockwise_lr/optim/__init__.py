"""The blockwise optimizers over whole parameters or flat shards: ``Blockwise<title>`` for every rule. Knows no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..plan.shards import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit
from .base import BlockwiseOptimizer
from .classes import CLASSES, optimizer_class

if TYPE_CHECKING:  # made from their rules at run time; so that they serve as types too

    class BlockwiseAdamW(BlockwiseOptimizer): ...

    class BlockwiseAdamMini(BlockwiseOptimizer): ...

    class BlockwiseLion(BlockwiseOptimizer): ...

    class BlockwiseRAdam(BlockwiseOptimizer): ...

    class BlockwiseMuon(BlockwiseOptimizer): ...

    class BlockwiseMuonMini(BlockwiseOptimizer): ...


__all__ = [
    "CLASSES",
    "BlockwiseOptimizer",
    "Cut",
    "Fragment",
    "InputSplit",
    "ShardBoundaries",
    "ShardMap",
    "TensorParallelSplit",
    "optimizer_class",
    *CLASSES,
]

Cut, InputSplit = ShardBoundaries, TensorParallelSplit  # their names before 0.3


def __getattr__(name: str) -> Any:
    try:
        return CLASSES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
