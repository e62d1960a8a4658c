"""Measurements of a model in training: sharpness, gradient noise, what each block type's updates do, and ratios from it."""

from .auto import AutoRatios, rebalanced
from .every import SharpnessEvery, sharpness_figures
from .guard import Alarm, Guard, Unstable
from .loss_ratio import LossRatio
from .metrics import block_metrics
from .monitor import BlockMonitor
from .noise import GradientNoise, Noise, measure_gradient_noise
from .parts import causal_lm, read_batches
from .sharpness import Estimate, Sharpness, measure_sharpness
from .sinks import csv_sink, tensorboard_sink, wandb_sink
from .updates import Updates, measure_updates, snapshot

__all__ = [
    "Alarm",
    "AutoRatios",
    "BlockMonitor",
    "Estimate",
    "GradientNoise",
    "Guard",
    "LossRatio",
    "Noise",
    "Sharpness",
    "SharpnessEvery",
    "Unstable",
    "Updates",
    "block_metrics",
    "causal_lm",
    "csv_sink",
    "measure_gradient_noise",
    "measure_sharpness",
    "measure_updates",
    "read_batches",
    "rebalanced",
    "sharpness_figures",
    "snapshot",
    "tensorboard_sink",
    "wandb_sink",
]
