"""Learning-rate schedules."""

from .tokens import BlockwiseTokenCosine
from .warmup_cosine import BlockwiseWarmupCosine, warmup_cosine

__all__ = ["BlockwiseTokenCosine", "BlockwiseWarmupCosine", "warmup_cosine"]
