"""Naming tables, one per model family: the first line that matches a name counts.

A family is found by the ``model_type`` of a model's config. Its own lines come first, then GENERIC. A new family is one
entry here and one row in the tests.
"""
from __future__ import annotations

from .rules import Rule
from .types import BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType

# Names that mean the same wherever they appear.
GENERIC: tuple[Rule, ...] = (
    Rule("*{norm,layernorm,layer_norm,rmsnorm}*", NORM, vector=True),
    Rule("*.{ln,ln_1,ln_2,ln_f,ln1,ln2,ln_attn,ln_mlp,norm1,norm2}.*", NORM, vector=True),
    Rule("*.{embed_tokens,wte,wpe,tok_embeddings,word_embeddings,position_embeddings,embed_positions,embed_in}.weight",
         EMBEDDING),
    Rule("*.{lm_head,embed_out}.*", HEAD),
    Rule("output.weight", HEAD),
    Rule("*.{q_proj,wq}.*", QK, heads="q"),
    Rule("*.{k_proj,wk}.*", QK, heads="kv"),
    Rule("*.{v_proj,wv}.*", VO),
    Rule("*.{o_proj,wo}.*", VO),
    Rule("*.{attn,attention}.{c_proj,out_proj}.*", VO),
    Rule("*.c_attn.*", split=("q", "k", "v")),
    Rule("*.{gate_proj,up_proj,down_proj,gate_up_proj}.*", FFN),
    Rule("*.{feed_forward,ffn,mlp}.{w1,w2,w3,c_fc,c_proj,fc1,fc2,fc_in,fc_out}.*", FFN),
    Rule("*.{dense_h_to_4h,dense_4h_to_h}.*", FFN),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "gpt_neox": (
        Rule("*.attention.query_key_value.*", split=("q", "k", "v"), interleave="head"),
        Rule("*.attention.dense.*", VO),
    ),
}


def family_rules(family: str | None) -> tuple[Rule, ...]:
    """The lines that apply to a family, its own first; only the generic ones for None or an unknown family."""
    return FAMILIES.get(family or "", ()) + GENERIC
