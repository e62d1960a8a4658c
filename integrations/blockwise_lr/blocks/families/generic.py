"""Names that mean the same wherever they appear: those of LLaMA, GPT-2, GPT-NeoX, Mamba and torchtitan."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType

GENERIC: tuple[Rule, ...] = (
    Rule("*{norm,layernorm,layer_norm,rmsnorm,LayerNorm}*", NORM, vector=True),
    Rule("*.{ln,ln_1,ln_2,ln_f,ln1,ln2,ln_attn,ln_mlp,norm1,norm2}.*", NORM, vector=True),
    Rule("*.{q_norm,k_norm}.weight", NORM),  # Cohere's has a row per head
    # embeddings and heads
    Rule(
        "*.{embed_tokens,wte,wpe,tok_embeddings,word_embeddings,position_embeddings,token_type_embeddings}.weight",
        EMBEDDING,
    ),
    Rule("*.{embed_positions,embed_in,embeddings}.weight", EMBEDDING),
    Rule("*.multi_modal_projector.*", EMBEDDING),  # makes the input vectors of the image's tokens
    Rule("*.{lm_head,embed_out}.*", HEAD),
    Rule("output.weight", HEAD),
    # attention
    Rule("*.{q_proj,wq}.*", QK, heads="q"),
    Rule("*.{k_proj,wk}.*", QK, heads="kv"),
    Rule("*.{v_proj,wv}.*", VO),
    Rule("*.{o_proj,wo}.*", VO),
    Rule("*.{attn,attention,self_attn}.{c_proj,out_proj}.*", VO),
    Rule("*.{self_attn,self_attention,attention}.dense.*", VO),
    Rule("*.c_attn.*", split=("q", "k", "v")),
    # feed-forward networks and mixtures of them
    Rule("*.experts.{gate_up_proj,down_proj}{,_bias}", FFN, batch_dims=1),
    Rule("*.{gate_proj,up_proj,down_proj,gate_up_proj}.*", FFN),
    Rule("*.{feed_forward,ffn,mlp}.{w1,w2,w3,c_fc,c_proj,fc1,fc2,fc_in,fc_out}.*", FFN),
    Rule("*.experts.*.{w1,w2,w3}.*", FFN),
    Rule("*.{dense_h_to_4h,dense_4h_to_h}.*", FFN),
    Rule("*.{mlp,feed_forward,block_sparse_moe}.{gate,router}.*", ROUTER),
    Rule("*.shared_expert_gate.*", ROUTER),
    # deepspeed.moe.layer.MoE, whose experts may be any module; a residual one has a dense expert and two weights beside
    Rule("*.deepspeed_moe.gate.wg.{weight,bias}", ROUTER),
    Rule("*.deepspeed_moe.experts.deepspeed_experts.*", FFN),
    Rule("*{moe,MoE,mlp,ffn,feed_forward,expert}*.coefficient.{weight,bias}", ROUTER),
    Rule("*{moe,MoE,mlp,ffn,feed_forward,expert}*.mlp.*", FFN),
    # state-space mixers; what sets the time scales and the skip is not decayed, as in Mamba's own code
    Rule("*.{mixer,mamba,linear_attn}.{A_log,D,dt_bias}", SSM, undecayed=True),
    Rule("*.{mixer,mamba,linear_attn}.{in_proj,x_proj,dt_proj,out_proj,conv1d,in_proj_qkvz,in_proj_ba}.*", SSM),
)
