"""Measurements of a model in training: sharpness, what each block type's updates do, and ratios from it."""

from .auto import AutoRatios, rebalanced
from .metrics import LossRatio, block_metrics
from .parts import causal_lm, read_batches
from .sharpness import Estimate, Sharpness, measure_sharpness
from .updates import Updates, measure_updates, snapshot

__all__ = [
    "AutoRatios",
    "Estimate",
    "LossRatio",
    "Sharpness",
    "Updates",
    "block_metrics",
    "causal_lm",
    "measure_sharpness",
    "measure_updates",
    "read_batches",
    "rebalanced",
    "snapshot",
]
