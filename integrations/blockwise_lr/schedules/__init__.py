"""Learning-rate schedules."""

from .warmup_cosine import BlockwiseWarmupCosine, warmup_cosine

__all__ = ["BlockwiseWarmupCosine", "warmup_cosine"]
