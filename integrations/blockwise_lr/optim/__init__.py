"""BlockwiseAdamW and BlockwiseAdamMini over whole parameters or flat shards. Knows no framework."""

from ..plan.shards import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit
from .adam_mini import BlockwiseAdamMini
from .adamw import BlockwiseAdamW

__all__ = [
    "BlockwiseAdamMini",
    "BlockwiseAdamW",
    "Cut",
    "Fragment",
    "InputSplit",
    "ShardBoundaries",
    "ShardMap",
    "TensorParallelSplit",
]

Cut, InputSplit = ShardBoundaries, TensorParallelSplit  # their names before 0.3
