"""One all-reduce a step for Adam-mini, and for block_clip, where ZeRO steps several flat tensors one after another.

ZeRO scales the gradients of a param group or sub group and steps it before it turns to the next. Reducing cut segments in
each of these steps would be one all-reduce per group; so at the first of them the sums of all are taken from the
gradients where they wait, unscaled, and the scale is put on the sums.
"""

from __future__ import annotations

from typing import Any

import torch

from ..optim.base import BlockwiseOptimizer
from ..optim.segmentwise import SegmentwiseOptimizer
from ..patches.deepspeed_instances import SEGMENT_SUMS
from ..patches.upstream_deepspeed import ZERO3, ZERO12, gradient_factor, is_a, waiting_gradients


def prereduce_once_per_step(wrapper: Any, optimizer: BlockwiseOptimizer) -> None:
    """Makes a ZeRO optimizer with several flat tensors reduce what all of them need before the first of them is scaled.

    Does nothing for other wrappers, and where no segment is cut and no block type is clipped.

    Raises:
        PatchError: DeepSpeed's scaling of gradients has changed.
    """
    shards = optimizer.shards
    segments = optimizer if isinstance(optimizer, SegmentwiseOptimizer) and shards and shards.boundaries else None
    if shards is None or not (segments or optimizer.block_clip) or len(shards.flats) < 2:
        return
    if not (is_a(wrapper, ZERO12) or is_a(wrapper, ZERO3)):
        return
    scale = wrapper.unscale_and_clip_grads
    gradient_factor(wrapper, torch.ones(()))  # fails here rather than at the first step

    def scale_after_sums(target: Any, total_norm: Any) -> None:
        clips = bool(optimizer.block_clip) and not optimizer.clip.is_prepared
        sums = segments is not None and not segments.has_prereduced_sums
        if clips or sums:
            factor = gradient_factor(wrapper, total_norm)
            waiting = [(flat, grad, factor) for flat, grad in waiting_gradients(wrapper)]
            if clips:
                optimizer.clip.prepare(waiting)
            if segments is not None and sums:
                segments.prereduce_segment_sums(waiting)
        scale(target, total_norm)

    SEGMENT_SUMS.apply(wrapper, unscale_and_clip_grads=scale_after_sums)
