"""Blockwise learning rates for Transformer pre-training (arXiv 2502.19002)."""

from __future__ import annotations

from typing import Any

from . import framework_marks, optim
from ._version import __version__
from .blocks import BlockError, BlockMap, BlockType, map_blocks
from .optim import BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, BlockwiseMuon, BlockwiseMuonMini, BlockwiseRAdam

__all__ = [
    "BlockError",
    "BlockMap",
    "BlockType",
    "BlockwiseAdamMini",
    "BlockwiseAdamW",
    "BlockwiseLion",
    "BlockwiseMuon",
    "BlockwiseMuonMini",
    "BlockwiseRAdam",
    "__version__",
    "map_blocks",
]

framework_marks.register()


def __getattr__(name: str) -> Any:  # the optimizers of all rules, also of those that this file does not name
    return getattr(optim, name) if name in optim.CLASSES else _missing(name)


def _missing(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
