"""Families with q, k and v in one weight; orders as in the split of the model's forward pass in transformers."""

from __future__ import annotations

from ..dims import HeadCounts
from ..layout import Piece
from ..rules import Rule, qkv_pieces
from ..types import BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType
QKV = ("q", "k", "v")


def _falcon(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """Falcon: [q heads, k, v] per query group (40B), all q then one k and v (7B), or [q, k, v] per head (RW)."""
    if heads.config.get("new_decoder_architecture"):
        return qkv_pieces(shape[0], heads.q, heads.kv, "group")
    if heads.config.get("multi_query"):
        return qkv_pieces(shape[0], heads.q, 1, "none")
    return qkv_pieces(shape[0], heads.q, heads.q, "head")


def _gpt_bigcode(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """StarCoder 1: all q then one k and v, or [q, k, v] per head without multi_query."""
    if heads.config.get("multi_query", True):
        return qkv_pieces(shape[0], heads.q, 1, "none")
    return qkv_pieces(shape[0], heads.q, heads.q, "head")


PER_HEAD = Rule("*.query_key_value.*", split=QKV, interleave="head")

FUSED: dict[str, tuple[Rule, ...]] = {
    "gpt_neox": (PER_HEAD,),
    "bloom": (PER_HEAD,),
    "falcon": (Rule("*.query_key_value.*", special=_falcon),),
    "gpt_bigcode": (Rule("*.c_attn.*", special=_gpt_bigcode),),
    "mpt": (Rule("*.Wqkv.*", split=QKV),),
    "phi3": (Rule("*.qkv_proj.*", split=QKV),),
    "qwen": (Rule("*.c_attn.*", split=QKV),),
    "baichuan": (Rule("*.W_pack.*", split=QKV),),
    "internlm2": (Rule("*.wqkv.*", split=QKV, interleave="group"),),
    "chatglm": (
        Rule("*.query_key_value.*", split=QKV),
        Rule("*.output_layer.weight", HEAD),
    ),
    # Qwen3-Next's query projection is [q, output gate] per head
    "qwen3_next": (Rule("*.self_attn.q_proj.*", split=("q", "gate"), interleave="head"),),
}
