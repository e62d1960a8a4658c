"""Families with q, k and v in one weight; orders as in the split of the model's forward pass in transformers."""

from __future__ import annotations

from ..dims import HeadCounts
from ..layout import Piece
from ..rules import Rule, qkv_pieces
from ..types import BlockType

QK, VO, HEAD = BlockType.QK, BlockType.VO, BlockType.HEAD
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


def _codegen(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """CodeGen: [q, v, k] for each of four groups of heads, the cores of the TPU that it was trained on."""
    part, head = shape[0] // (3 * _CODEGEN_GROUPS), shape[0] // 3 // heads.q
    return (Piece(QK, part, head, "q"), Piece(VO, part, 1, "v"), Piece(QK, part, head, "k")), _CODEGEN_GROUPS


_CODEGEN_GROUPS = 4
# Qwen3-Next's query projection is [q, output gate] per head
GATED_QUERY = Rule("*.self_attn.q_proj.*", split=("q", "gate"), interleave="head")
PER_HEAD = Rule("*.query_key_value.*", split=QKV, interleave="head")

FUSED: dict[str, tuple[Rule, ...]] = {
    "gpt_neox": (PER_HEAD,),
    "bloom": (PER_HEAD,),
    "falcon": (Rule("*.query_key_value.*", special=_falcon),),
    "gpt_bigcode": (Rule("*.c_attn.*", special=_gpt_bigcode),),
    "persimmon": (PER_HEAD,),
    "fuyu": (PER_HEAD,),
    "gpt_neox_japanese": (PER_HEAD,),
    "codegen": (Rule("*.qkv_proj.*", special=_codegen),),
    "deberta": (Rule("*.self.in_proj.*", split=QKV, interleave="head"),),
    "phi3": (Rule("*.qkv_proj.*", split=QKV),),
    "phi4_multimodal": (Rule("*.qkv_proj.*", split=QKV),),
    "qwen": (Rule("*.c_attn.*", split=QKV),),
    "baichuan": (Rule("*.W_pack.*", split=QKV),),
    "internlm2": (Rule("*.wqkv.*", split=QKV, interleave="group"),),
    "chatglm": (
        Rule("*.query_key_value.*", split=QKV),
        Rule("*.output_layer.weight", HEAD),
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), (GATED_QUERY,)),
}
