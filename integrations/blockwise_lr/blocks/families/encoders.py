"""BERT, T5, ViT, vision towers and OPT, whose names have another meaning in other families."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType

BERT = (
    Rule("*.attention.{self,attention}.query.*", QK, heads="q"),
    Rule("*.attention.{self,attention}.key.*", QK, heads="kv"),
    Rule("*.attention.{self,attention}.value.*", VO),
    Rule("*.attention.output.dense.*", VO),
    Rule("*.{intermediate,output}.dense.*", FFN),
    Rule("*{LayerNorm,layer_norm}*", NORM, vector=True),
    Rule("*.{cls,pooler,classifier}.*", HEAD),
)

# the vision tower of Gemma 3 and others; its pooling head is one attention with a learned query
SIGLIP = (
    Rule("*.embeddings.{patch_embedding,position_embedding}.*", EMBEDDING),
    Rule("*.head.*norm*.*", NORM, vector=True),
    Rule("*.vision_tower.head.*", HEAD),
)

ENCODERS: dict[str, tuple[Rule, ...]] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "vit": (
        Rule("*.embeddings.{cls_token,mask_token,position_embeddings}", EMBEDDING, batch_dims=1),
        Rule("*.patch_embeddings.projection.*", EMBEDDING),
        *BERT,
    ),
    "siglip_vision_model": SIGLIP,
    "t5": (
        Rule("*.{SelfAttention,EncDecAttention}.q.*", QK, heads="q"),
        Rule("*.{SelfAttention,EncDecAttention}.k.*", QK, heads="kv"),
        Rule("*.{SelfAttention,EncDecAttention}.{v,o}.*", VO),
        Rule("*.relative_attention_bias.weight", QK),  # added to the attention logits
        Rule("*.DenseReluDense.*", FFN),
        Rule("shared.weight", EMBEDDING),
    ),
    "opt": (
        Rule("*.{fc1,fc2}.*", FFN),
        Rule("*.project_in.*", EMBEDDING),  # the two halves of a factored embedding and head
        Rule("*.project_out.*", HEAD),
    ),
}
