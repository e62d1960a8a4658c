"""Measurements of a model in training: sharpness, what each block type's updates do, and ratios from it."""

from .auto import AutoRatios, rebalanced
from .every import SharpnessEvery, sharpness_figures
from .guard import Alarm, Guard, Unstable
from .loss_ratio import LossRatio
from .metrics import block_metrics
from .monitor import BlockMonitor
from .parts import causal_lm, read_batches
from .sharpness import Estimate, Sharpness, measure_sharpness
from .sinks import csv_sink, tensorboard_sink, wandb_sink
from .updates import Updates, measure_updates, snapshot

__all__ = [
    "Alarm",
    "AutoRatios",
    "BlockMonitor",
    "Estimate",
    "Guard",
    "LossRatio",
    "Sharpness",
    "SharpnessEvery",
    "Unstable",
    "Updates",
    "block_metrics",
    "causal_lm",
    "csv_sink",
    "measure_sharpness",
    "measure_updates",
    "read_batches",
    "rebalanced",
    "sharpness_figures",
    "snapshot",
    "tensorboard_sink",
    "wandb_sink",
]
