"""Shard maps (which elements a rank's flat tensors hold) and step plans. Imports neither kernels nor optim."""

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
