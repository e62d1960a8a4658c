"""One all-reduce a step for Adam-mini where ZeRO steps several flat tensors one after another.

ZeRO scales the gradients of a param group or sub group and steps it before it turns to the next. Reducing cut segments in
each of these steps would be one all-reduce per group; so at the first of them the sums of all are taken from the
gradients where they wait, unscaled, and the scale is put on the sums.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..optim.segmentwise import SegmentwiseOptimizer


def prereduce_once_per_step(wrapper: Any, optimizer: SegmentwiseOptimizer) -> None:
    """Makes a ZeRO optimizer with several flat tensors call prereduce_segment_sums before the first of them is scaled."""
    is_stage3 = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3)
    scale = wrapper.unscale_and_clip_grads
    waiting = _waiting_stage3 if is_stage3 else _waiting_stage12

    def scale_after_sums(target: Any, total_norm: Any) -> None:
        if not optimizer.has_prereduced_sums:
            factor = (_factor_stage3 if is_stage3 else _factor_stage12)(wrapper, total_norm)
            optimizer.prereduce_segment_sums([(flat, grad, factor) for flat, grad in waiting(wrapper)])
        scale(target, total_norm)

    wrapper.unscale_and_clip_grads = scale_after_sums


def _factor_stage12(wrapper: Any, total_norm: Any) -> float:
    """What the gradients are about to be multiplied with, read off a 1 that goes through DeepSpeed's own scaling."""
    probe = torch.ones(1, dtype=torch.float32)
    type(wrapper).unscale_and_clip_grads(wrapper, [probe], _on_cpu(total_norm))
    return float(probe)


def _factor_stage3(wrapper: Any, total_norm: Any) -> float:
    probe = torch.ones(1, dtype=torch.float32)
    stand_in = SimpleNamespace(
        loss_scale=wrapper.loss_scale,
        clip_grad=wrapper.clip_grad,
        fp32_partitioned_groups_flat=[SimpleNamespace(grad=probe)],
    )
    type(wrapper).unscale_and_clip_grads(stand_in, 0, _on_cpu(total_norm))
    return float(probe)


def _on_cpu(norm: Any) -> Any:
    return norm.cpu() if isinstance(norm, torch.Tensor) else norm


def _waiting_stage12(wrapper: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(flat tensor, flat gradient) of every group: of the first, already in place; of the others, where they were
    averaged."""
    found = []
    for number, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        grad = flat.grad
        if grad is None:
            grad = wrapper._get_preflattened_grad_partition(number)
        if grad is None:
            grad = wrapper.flatten(wrapper.averaged_gradients[number])
        found.append((flat, grad))
    return found


def _waiting_stage3(wrapper: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (flat, flat.grad if flat.grad is not None else wrapper.flatten(wrapper.averaged_gradients[number]))
        for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
    ]
