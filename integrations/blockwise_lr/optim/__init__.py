"""BlockwiseAdamW and BlockwiseAdamMini over whole parameters or flat shards. Knows no framework."""
from .adam_mini import BlockwiseAdamMini
from .adamw import BlockwiseAdamW
from .shards import Cut, Fragment, InputSplit, ShardMap

__all__ = ["BlockwiseAdamMini", "BlockwiseAdamW", "Cut", "Fragment", "InputSplit", "ShardMap"]
