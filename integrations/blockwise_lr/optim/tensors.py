"""An optimizer's tensors as kernels need them: one contiguous row each, checked before any of them is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..blocks import BlockError, ParamLayout
from ..plan.dtensor import local
from ..rules.base import State


def row(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or this rank's shard of a DTensor, as one row of real numbers: it shares the memory where that is
    contiguous and is a copy where it is not. Complex numbers are pairs, as torch.optim.AdamW takes them."""
    tensor = local(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.contiguous().view(-1)


def is_row(tensor: torch.Tensor) -> bool:
    """Whether :func:`row` of the tensor shares its memory."""
    return local(tensor).is_contiguous()


def row_numel(tensor: torch.Tensor) -> int:
    """Elements of :func:`row`."""
    tensor = local(tensor)
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def write_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Writes a row that was a copy back into its tensor."""
    tensor = local(tensor)
    if tensor.is_complex():
        tensor.copy_(torch.view_as_complex(values.view(*tensor.shape, 2)))
    else:
        tensor.copy_(values.view(tensor.shape))


def empty_moment(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the tensor's shape, dtype and placement, contiguous in memory."""
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def real_layout(layout: ParamLayout) -> ParamLayout:
    """The layout of a complex parameter whose elements are pairs of real numbers.

    Raises:
        BlockError: its output axis is the last one, where the pairs come between.
    """
    if layout.transposed:
        raise BlockError(
            f"{layout.name} is complex and transposed, which blockwise optimizers do not support; store it with "
            f"its output rows first"
        )
    return replace(layout, shape=(*layout.shape, 2))


def refuse_unlike(
    name: str, tensor: torch.Tensor, state: Mapping[str, Any], numel: int, states: Mapping[State, int]
) -> None:
    """Compares what a step would read and write with the plan it would follow.

    Args:
        name: the tensor's, for the error.
        tensor: with its gradient.
        state: its state, perhaps still empty.
        numel: elements of the plan.
        states: elements of each of the rule's states in this rank's state.

    Raises:
        BlockError: a gradient, moment or the tensor itself is of another size, type, device or kind.
    """
    grad = tensor.grad
    if grad is None:
        raise BlockError(f"{name} has no gradient; call backward before step")
    if grad.layout != torch.strided:
        raise BlockError(
            f"{name} has a sparse gradient, which blockwise optimizers do not support; build the embedding with sparse=False"
        )
    if row_numel(tensor) != numel:
        raise BlockError(
            f"{name} has {row_numel(tensor)} elements and had {numel} when the optimizer was built; its data was "
            f"replaced by a tensor of another size, so build a new optimizer"
        )
    if (
        isinstance(grad, DTensor) != isinstance(tensor, DTensor)
        or row_numel(grad) != numel
        or (isinstance(grad, DTensor) and isinstance(tensor, DTensor) and grad.placements != tensor.placements)
    ):
        raise BlockError(
            f"the gradient of {name} is of shape {tuple(grad.shape)} and another placement or size than the "
            f"parameter, of shape {tuple(tensor.shape)}; set .grad to a tensor like the parameter"
        )
    if grad.device != tensor.device:
        raise BlockError(
            f"the gradient of {name} is on {grad.device} and the parameter on {tensor.device}; move one of them"
        )
    for spec, wanted in states.items() if state else ():
        key, moment = spec.name, state.get(spec.name)
        if not isinstance(moment, torch.Tensor) or row_numel(moment) != wanted:
            raise BlockError(
                f"the state of {name} has no {key} of {wanted} elements; load a state that fits, or clear "
                f"optimizer.state to start anew"
            )
        if moment.device != tensor.device or (spec.per == "element" and moment.dtype != tensor.dtype):
            raise BlockError(
                f"{name} is {tensor.dtype} on {tensor.device} and its {key} {moment.dtype} on {moment.device}; "
                f"build the optimizer after the model is moved or converted"
            )
