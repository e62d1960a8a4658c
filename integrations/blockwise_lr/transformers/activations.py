"""Bytes that a forward pass keeps for the backward pass, and the most that both need, counted on the module without memory.

The model is built and run with fake tensors, which have shapes and no contents; every tensor that autograd saves is counted
once, parameters are not. Attention is PyTorch's causal scaled_dot_product_attention, which keeps no scores, as flash
attention on a GPU. The most at a time is found by PyTorch's MemTracker, which sees tensors made and freed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.multiprocessing.reductions import StorageWeakRef

from ..blocks import BlockError

_NAME = "blockwise_lr_counted"


def activation_bytes(
    config: Any, sequences: int, length: int, *, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False
) -> int:
    """What a Hugging Face causal language model saves in one forward pass with a loss, on one device without parallelism.

    Args:
        config: a transformers config.
        sequences: of a micro-batch.
        length: tokens of each.
        dtype: of parameters and activations.
        checkpointing: recompute every layer in the backward pass; its input alone is kept then.

    Raises:
        BlockError: sizes below 1, or a model that does not run without contents (its shapes depend on values).
        ImportError: transformers is not installed.
    """
    with _without_contents(config, sequences, length, dtype, checkpointing) as (model, ids):
        return _saved(model, ids)


@dataclass(frozen=True)
class PassPeak:
    """Bytes beside the parameters when a forward and backward pass holds the most.

    Attributes:
        gradients: of parameters, as far as there are any then.
        others: activations and what operations need for a while.
    """

    gradients: int
    others: int


def pass_peak(
    config: Any, sequences: int, length: int, *, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False
) -> PassPeak:
    """The most that a forward and backward pass holds at a time; arguments and errors as for :func:`activation_bytes`."""
    with _without_contents(config, sequences, length, dtype, checkpointing) as (model, ids):
        tracker = MemTracker()
        tracker.track_external(model, ids)
        with tracker:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        (found,) = tracker.get_tracker_snapshot("peak").values()
        by_kind = {getattr(kind, "name", kind): int(held) for kind, held in found.items()}
        held = by_kind["PARAM"] + by_kind["BUFFER"] + by_kind["GRAD"]
        return PassPeak(by_kind["GRAD"], by_kind["Total"] - held)


@contextlib.contextmanager
def _without_contents(
    config: Any, sequences: int, length: int, dtype: torch.dtype, checkpointing: bool
) -> Iterator[tuple[Any, torch.Tensor]]:
    """The model, and token ids for it."""
    import transformers

    if sequences < 1 or length < 1:
        raise BlockError(f"{sequences} sequences of {length} tokens; give at least 1 of each")
    transformers.AttentionInterface.register(_NAME, _attention)
    transformers.AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    try:
        with FakeTensorMode():
            model = transformers.AutoModelForCausalLM.from_config(  # which notes the dtype in the config
                copy.deepcopy(config), attn_implementation=_NAME, dtype=dtype
            ).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            yield model, torch.zeros(sequences, length, dtype=torch.long)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise BlockError(
            f"{type(config).__name__} does not run without contents, so its activations cannot be counted: {error}"
        ) from None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of (sequences, heads, length, size), as transformers' attention functions."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _saved(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes of all storages that autograd keeps, without the parameters'."""
    mine = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (known := StorageWeakRef(storage)) not in mine:
            kept[known] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    found = sum(kept.values())
    del out  # held until now, so that no storage was given to another tensor
    return found
