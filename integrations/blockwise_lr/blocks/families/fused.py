"""Families that keep q, k and v in one weight, each in its own order (named by the attribute or by its split in
the model's forward)."""

from __future__ import annotations

from ..dims import HeadCounts
from ..layout import Piece
from ..rules import Rule, qkv_pieces
from ..types import BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType
QKV = ("q", "k", "v")


def _falcon(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """Falcon's three generations: per query group (40B and later), all q with one k and v (7B), or per head (RW)."""
    if heads.config.get("new_decoder_architecture"):
        return qkv_pieces(shape[0], heads.q, heads.kv, "group")
    if heads.config.get("multi_query"):
        return qkv_pieces(shape[0], heads.q, 1, "none")
    return qkv_pieces(shape[0], heads.q, heads.q, "head")


def _gpt_bigcode(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """StarCoder 1: all q with one k and v, or per head without multi_query."""
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
    # the query projection of Qwen3-Next also holds the gate of the attention's output, per head
    "qwen3_next": (Rule("*.self_attn.q_proj.*", split=("q", "gate"), interleave="head"),),
}
