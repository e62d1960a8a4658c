"""Learning-rate schedules: curves, which are pure functions of steps or tokens, and a scheduler for each. And epsilon's."""

from .base import BlockwiseSchedule
from .curves import Curve
from .epsilon import SmoothedEpsilon
from .schedulers import (
    SCHEDULES,
    BlockwiseInfinite,
    BlockwiseRewarm,
    BlockwiseWarmupConstant,
    BlockwiseWarmupCosine,
    BlockwiseWarmupInverseSqrt,
    BlockwiseWarmupLinear,
    BlockwiseWSD,
)
from .tokens import BlockwiseTokenCosine
from .warmup_cosine import warmup_cosine

__all__ = [
    "SCHEDULES",
    "BlockwiseInfinite",
    "BlockwiseRewarm",
    "BlockwiseSchedule",
    "BlockwiseTokenCosine",
    "BlockwiseWSD",
    "BlockwiseWarmupConstant",
    "BlockwiseWarmupCosine",
    "BlockwiseWarmupInverseSqrt",
    "BlockwiseWarmupLinear",
    "Curve",
    "SmoothedEpsilon",
    "warmup_cosine",
]
