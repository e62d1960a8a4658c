"""Sequence length warmup (arXiv 2108.06084): short sequences first, which keeps early steps stable at high rates."""

from .cutting import Cutter
from .schedule import LengthSchedule, WarmupOptions, layout_multiple
from .warmup import SequenceLengthWarmup, warmup_of

__all__ = ["Cutter", "LengthSchedule", "SequenceLengthWarmup", "WarmupOptions", "layout_multiple", "warmup_of"]
