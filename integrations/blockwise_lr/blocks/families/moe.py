"""Families with transposed stacked experts, attention sinks, or multi-head latent attention (MLA)."""

from __future__ import annotations

from ..dims import HeadCounts
from ..layout import Piece
from ..rules import Rule
from ..types import BlockError, BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType


def _latent_up(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """kv_b_proj of MLA: [k without its rotary part, v] per head."""
    k, v = _sizes(heads, "qk_nope_head_dim", "v_head_dim")
    return (Piece(QK, k, k, "k"), Piece(VO, v, 1, "v")), heads.q


def _latent_down(shape: tuple[int, ...], heads: HeadCounts) -> tuple[tuple[Piece, ...], int]:
    """kv_a_proj_with_mqa of MLA: [latent of k and v, rotary part of k, shared by all heads].

    The latent feeds both k and v; it is mapped to vo, the block type with the smaller learning rate.
    """
    latent, rotary = _sizes(heads, "kv_lora_rank", "qk_rope_head_dim")
    return (Piece(VO, latent, 1, "latent"), Piece(QK, rotary, rotary, "k")), 1


def _sizes(heads: HeadCounts, *names: str) -> list[int]:
    missing = [name for name in names if not isinstance(heads.config.get(name), int)]
    if missing:
        raise BlockError(f"the model's config does not state {missing[0]!r}, which tells k from v in latent attention")
    return [heads.config[name] for name in names]


LATENT_ATTENTION = (
    Rule("*.self_attn.q_a_proj.*", QK),
    Rule("*.self_attn.q_b_proj.*", QK, heads="q"),
    Rule("*.self_attn.kv_a_proj_with_mqa.*", special=_latent_down),
    Rule("*.self_attn.kv_b_proj.*", special=_latent_up),
)
# experts whose weights are (experts, inputs, outputs)
INPUTS_FIRST = Rule("*.experts.{gate_up_proj,down_proj}{,_bias}", FFN, batch_dims=1, transposed=True)

MOE: dict[str, tuple[Rule, ...]] = {
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "llama4": (INPUTS_FIRST,),
    "llama4_text": (INPUTS_FIRST,),
    "gpt_oss": (
        INPUTS_FIRST,
        Rule("*.self_attn.sinks", QK),  # added to the attention logits
    ),
}
