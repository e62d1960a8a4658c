"""Block types, naming rules and layouts: the block type of every row of every parameter. Imports no framework."""

from .block_map import BlockMap, UnmappedParameterError, map_blocks, map_names
from .dims import HeadCounts, head_counts
from .layout import ParamLayout, Piece
from .presets import PRESETS, lr_ratios
from .rules import Rule
from .types import PAPER_RATIOS, BlockError, BlockType

__all__ = [
    "PAPER_RATIOS",
    "PRESETS",
    "BlockError",
    "BlockMap",
    "BlockType",
    "HeadCounts",
    "ParamLayout",
    "Piece",
    "Rule",
    "UnmappedParameterError",
    "head_counts",
    "lr_ratios",
    "map_blocks",
    "map_names",
]
