"""Which part of which parameter lies where, and the ranges and segments that a step follows. Below kernels and optim."""

from .shards import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit, even_boundaries
from .step_plan import Rectangles, StepClass, StepPlan, element_plan, segment_plan

__all__ = [
    "Fragment",
    "Rectangles",
    "ShardBoundaries",
    "ShardMap",
    "StepClass",
    "StepPlan",
    "TensorParallelSplit",
    "element_plan",
    "even_boundaries",
    "segment_plan",
]
