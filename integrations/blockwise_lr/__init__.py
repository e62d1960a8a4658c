"""Blockwise learning rates for Transformer pre-training (arXiv 2502.19002)."""
from .blocks import BlockError, BlockMap, BlockType, map_blocks
from .optim import BlockwiseAdamMini, BlockwiseAdamW

__version__ = "0.1.0"
__all__ = ["BlockError", "BlockMap", "BlockType", "BlockwiseAdamMini", "BlockwiseAdamW", "map_blocks"]
