"""The attributes that DeepSpeed and Megatron put on parameters, read here and nowhere else; imports neither of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from .blocks import marks
from .blocks.marks import Marks


def deepspeed_marks(parameter: torch.Tensor) -> Marks:
    """DeepSpeed's: ZeRO-3 leaves an empty tensor in a parameter's place and notes its shape (``ds_shape``)."""
    shape = getattr(parameter, "ds_shape", None)
    return Marks(shape=None if shape is None else tuple(shape))


def megatron_marks(parameter: torch.Tensor) -> Marks:
    """Megatron's: tied embeddings of other stages (``shared_embedding``), and slices (``tensor_model_parallel``)."""
    split = bool(getattr(parameter, "tensor_model_parallel", False))
    return Marks(
        is_tied_copy=bool(getattr(parameter, "shared_embedding", False)),
        # Megatron 0.16 does not state the axis of what mixers slice, and leaves -1
        split_axis=int(getattr(parameter, "partition_dim", -1)) if split else None,
    )


def megatron_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A TransformerConfig, which names no family, and this rank's place in tensor parallelism, which no config states."""
    parts = values.get("tensor_model_parallel_size")
    if parts is None:
        return {}
    state = sys.modules.get("megatron.core.parallel_state")  # what is not imported has made no slices
    known = (
        state is not None
        and state.model_parallel_is_initialized()
        and state.get_tensor_model_parallel_world_size() == parts
    )
    return {
        "model_type": "megatron",
        "tensor_model_parallel_rank": state.get_tensor_model_parallel_rank() if known else None,
    }


def register() -> None:
    """Hands these readers to the block map."""
    marks.add_reader(deepspeed_marks)
    marks.add_reader(megatron_marks)
    marks.add_config_reader(megatron_config)
