"""Head counts of an attention layer, read from a model's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .marks import completed_config
from .types import BlockError

# Spellings of one number in the configs of different families; the first one that is set is used.
_Q_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "nhead")
_KV_HEADS = (
    "num_key_value_heads",
    "n_kv_heads",
    "n_head_kv",
    "num_kv_heads",
    "num_query_groups",
    "n_kv_head",
    "multi_query_group_num",
)
_HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim", "d_kv")


@dataclass(frozen=True)
class HeadCounts:
    """Attention heads of one rank's layers.

    Attributes:
        q: query heads.
        kv: key and value heads (query groups); 0 if several tensor-parallel ranks share one.
        config: all other values of the config, for families with further sizes (MLA ranks, ...).
        head_dim: rows of a query or key head, where the attention module itself states it.
    """

    q: int
    kv: int
    config: Mapping[str, Any]
    head_dim: int | None = None


def config_values(config: Any) -> dict[str, Any]:
    """A config object (Hugging Face, a dataclass, a namespace, a dict) as a plain dict."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "get_text_config"):  # a multimodal config nests that of the language model
        config = config.get_text_config()
    # to_dict omits transformers' attribute_map (old spellings), so look up each name as an attribute too
    if not hasattr(config, "to_dict") and not hasattr(config, "__dict__"):
        return {}  # a string, number or list, which some modules keep under the name
    values = dict(config.to_dict()) if hasattr(config, "to_dict") else dict(vars(config))
    for name in (*_Q_HEADS, *_KV_HEADS, *_HEAD_DIM):
        if name not in values and getattr(config, name, None) is not None:
            values[name] = getattr(config, name)
    return completed_config(values)


def head_counts(config: Any) -> HeadCounts | None:
    """The head counts of a config, or None if it states none; for a Megatron config, those of one tensor-parallel rank.

    Raises:
        BlockError: counts below 1, or heads that do not divide over Megatron's tensor-parallel ranks.
    """
    values = config_values(config)
    q = _count(values, _Q_HEADS)
    if q is None:
        return None
    kv = _count(values, _KV_HEADS) or (1 if values.get("multi_query") else q)
    parts = values.get("tensor_model_parallel_size") or 1
    if q % parts or (kv % parts and parts % kv):
        raise BlockError(
            f"{q} query heads and {kv} query groups do not divide over {parts} tensor-parallel ranks; use a "
            f"tensor-parallel size that divides {math.gcd(q, kv)}, or one that divides {q} and is a multiple "
            f"of {kv}"
        )
    return HeadCounts(q=q // parts, kv=kv // parts, config=values)


def _count(values: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The value of the first of these names that the config states as an integer."""
    name = next(
        (name for name in names if isinstance(values.get(name), int) and not isinstance(values[name], bool)), None
    )
    if name is None or (values[name] == 0 and names is _KV_HEADS):  # some configs state 0 for "as many as query heads"
        return None
    if values[name] < 1:
        raise BlockError(f"the model's config states {name} = {values[name]}; give a number of heads, 1 or above")
    return values[name]
