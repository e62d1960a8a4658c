"""Blockwise learning rates for Transformer pre-training (arXiv 2502.19002)."""

from . import framework_marks
from ._version import __version__
from .blocks import BlockError, BlockMap, BlockType, map_blocks
from .optim import BlockwiseAdamMini, BlockwiseAdamW

__all__ = ["BlockError", "BlockMap", "BlockType", "BlockwiseAdamMini", "BlockwiseAdamW", "__version__", "map_blocks"]

framework_marks.register()
