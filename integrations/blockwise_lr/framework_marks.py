"""Readers of the attributes that DeepSpeed and Megatron set on parameters. Imports neither of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from .blocks import marks
from .blocks.marks import Marks


def deepspeed_marks(parameter: torch.Tensor) -> Marks:
    """DeepSpeed: ZeRO-3 replaces a parameter's data by an empty tensor and keeps its shape in ``ds_shape``."""
    shape = getattr(parameter, "ds_shape", None)
    return Marks(shape=None if shape is None else tuple(shape))


def megatron_marks(parameter: torch.Tensor) -> Marks:
    """Megatron: embeddings tied across stages (``shared_embedding``), and slices (``tensor_model_parallel``)."""
    split = bool(getattr(parameter, "tensor_model_parallel", False))
    return Marks(
        is_tied_copy=bool(getattr(parameter, "shared_embedding", False)),
        # Megatron 0.16 leaves partition_dim at -1 for the slices of Mamba mixers
        split_axis=int(getattr(parameter, "partition_dim", -1)) if split else None,
    )


def megatron_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values that a TransformerConfig lacks: ``model_type``, and this process's tensor-parallel rank."""
    parts = values.get("tensor_model_parallel_size")
    if parts is None:
        return {}
    return {"model_type": "megatron", "tensor_model_parallel_rank": _tensor_parallel_rank(parts)}


def _tensor_parallel_rank(ranks: int) -> int | None:
    """This process's rank among that many tensor-parallel ranks; None where Megatron has not set up such groups."""
    state: Any = sys.modules.get("megatron.core.parallel_state")  # not imported: no slices were made
    if state is None or not state.model_parallel_is_initialized():
        return None
    return state.get_tensor_model_parallel_rank() if state.get_tensor_model_parallel_world_size() == ranks else None


def register() -> None:
    """Registers these readers with :mod:`blockwise_lr.blocks.marks`."""
    marks.add_reader(deepspeed_marks)
    marks.add_reader(megatron_marks)
    marks.add_config_reader(megatron_config)
