"""Attention by names and by the classes around them: q, k, v, the output, their gates, and what enters the scores.

A projection is what its own name says, wherever it stands; short names (``q``, ``query``, ``proj``) mean it inside an
attention module only, which its class tells, or a parent's name where no modules are known.
"""

from __future__ import annotations

from ..dims import HeadCounts
from ..layout import Piece
from ..rules import Rule
from ..types import BlockError, BlockType

QK, VO, FFN = BlockType.QK, BlockType.VO, BlockType.FFN
QKV = ("q", "k", "v")
Pieces = tuple[tuple[Piece, ...], int]

# classes that hold attention; the trailing star is the rest of the path, down to the parameter's own module
WITHIN = (
    "*{Attention,AttentionV2,AttentionSubsample,AttentionDownsample,AttentionPoolLatent,Attn,AttnBlock,FactorAttnConvRelPosEnc,"
    "MoA,CCAProjection,MLA,GPSA,MHSA,XCA}/*"
)
_NAMED = "*{attn,Attn,attention,Attention}*."  # a parent's name, in the last four parts of a name


def _short(names: str, block: BlockType, heads: str | None = None) -> tuple[Rule, ...]:
    """Rules for names that mean this inside attention only."""
    return (
        Rule(f"*.{{{names}}}.{{weight,bias}}", block, heads=heads, within=WITHIN),
        Rule(f"{_NAMED}{{{names}}}.{{weight,bias}}", block, heads=heads, tail=4),
    )


def _latent_up(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """kv_b_proj of MLA: [k without its rotary part, v] per head."""
    k, v = sizes(heads, "qk_nope_head_dim", "v_head_dim")
    return (Piece(QK, k, k, "k"), Piece(VO, v, 1, "v")), shape[0] // (k + v)


def _latent_down(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """kv_a_proj_with_mqa of MLA: [latent of k and v, rotary part of k, shared by all heads].

    The latent feeds both k and v; it is mapped to vo, the block type with the smaller learning rate.
    """
    latent, rotary = sizes(heads, "kv_lora_rank", "qk_rope_head_dim")
    pieces = (Piece(VO, latent, 1, "latent"), Piece(QK, rotary, rotary, "k"))
    return tuple(piece for piece in pieces if piece.size), 1


def _gated_query(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """q_gate_proj of MLA (A.X K2): [q, output gate of v's size] per head."""
    q, v = sizes(heads, "qk_head_dim", "v_head_dim")
    return (Piece(QK, q, q, "q"), Piece(VO, v, 1, "gate")), shape[0] // (q + v)


def _levit(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """LeViT: [q, k, v] per head, v wider by the attention's ratio (timm's states its size); the layers that shrink hold
    [k, v]."""
    (key,) = sizes(heads, "key_dim")
    value = heads.config.get("val_dim") or key * sizes(heads, "attention_ratio")[0]
    q, rest = Piece(QK, key, key, "q"), (Piece(QK, key, key, "k"), Piece(VO, value, 1, "v"))
    pieces = (q, *rest) if shape[0] == heads.q * (2 * key + value) else rest
    return pieces, heads.q


def _global_window(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """GC ViT: all q, all k, all v; where queries are of the whole picture, all k, all v."""
    part = heads.q * (heads.head_dim or 1)
    k, v = Piece(QK, part, heads.head_dim, "k"), Piece(VO, part, 1, "v")
    return ((k, v) if shape[0] == 2 * part else (Piece(QK, part, heads.head_dim, "q"), k, v)), 1


def _parallel_scaling(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """timm's ViT of 22B's kind: [feed-forward network, all q, all k, all v] in one weight, of a square block's width."""
    width = shape[1]
    parts = (Piece(QK, width, heads.head_dim, "q"), Piece(QK, width, heads.head_dim, "k"), Piece(VO, width, 1, "v"))
    return (Piece(FFN, shape[0] - 3 * width, 1, "up"), *parts), 1


def sizes(heads: HeadCounts, *names: str) -> list[int]:
    """Sizes that the attention module or the model's config states.

    Raises:
        BlockError: one of them is stated by neither.
    """
    missing = [name for name in names if not isinstance(heads.config.get(name), int)]
    if missing:
        raise BlockError(f"the model's config does not state {missing[0]!r}, which tells the parts of this weight")
    return [heads.config[name] for name in names]


# What enters the scores beside q and k. Before the projections, whose names some of them contain.
_SCORES = (
    Rule("*.{sinks,sink,sqk,softmax_offset,attention_biases,rel_pos_h,rel_pos_w,w_g}", QK),
    Rule("*.{lambda_q1,lambda_q2,lambda_k1,lambda_k2}", QK),  # DiffLlama: the difference of two softmaxes
    Rule("*.{relative_attention_bias,relative_attention_bias_layer,rel_attn_embed,distance_embedding}*", QK),
    Rule("*.{relative_position_bias_table,relative_position_bias,rel_pos_bias,rel_pos,rel_pos_emb}*", QK),
    Rule("*.{relative_pos_embeddings,continuous_position_bias_mlp,cpb_mlp,rel_logits_proj,r_proj}*", QK),
    Rule("*.{linear_pos,relative_k_proj,pos_proj,pos_key_proj,pos_query_proj,pos_q_proj,pos_k_proj}.*", QK),
    Rule("*.{r_w_bias,r_r_bias,r_s_bias,r_kernel,seg_embed,pos_bias_u,pos_bias_v,bias_u}", QK, within=WITHIN),
    Rule("*.{bias_v,q_bias,k_bias,logit_scale,A,dt_proj.weight,dt_proj.bias,conv.weight}", QK, within=WITHIN),
    Rule("*{attn,attention}*.{q_bias,k_bias}", QK, tail=2),  # BEiT's and EVA's, beside a qkv without one
    Rule("*.sink_proj.*", QK),
    Rule("*.{attn,xca}.temperature", QK, batch_dims=None),  # XCiT's, per head
    Rule("*.attn.{proj_l,gating_param}*", QK),  # CaiT mixes heads' scores, ConViT scores of contents and of positions
    Rule("*.attn.proj_w.*", VO),  # CaiT mixes heads' weights, behind the softmax
    Rule("*.attn.attn.*", QK, within="*OutlookAttention/*"),  # VOLO makes its weights of one token
    Rule("*.crpe.conv_list.*", QK),  # CoaT's relative positions
    Rule("*.pos_embed.{height_rel,width_rel}", QK),  # BoTNet's
    Rule("*.query", QK, batch_dims=None, within="*AttentionResidual/"),  # Inkling 2 attends over its own layers
    Rule("*.rel_attn.{r,r_w_bias,r_r_bias,r_s_bias,seg_embed}", QK),
    Rule("*.{gru_rel_pos_linear,gru_rel_pos_const}*", QK),  # WavLM: gates of the relative positions
    Rule("*.position_bias", QK, within="*{Compressor,Indexer}/*"),
    Rule("*.{softmax_scaling,rotary_emb}.*", QK),
    Rule("*.{conv_qk_depthwise,conv_qk_grouped,k_sconv}.*", QK),  # over the sequence of queries and keys
    # sparse attention's indexer picks keys, so all of it serves the scores
    Rule("*.indexer.{wq_b,q_b_proj}.*", QK, heads="q"),
    Rule("*.indexer.{wk,k_proj}.*", QK, heads="kv"),
    Rule("*.indexer.*", QK),
)
# Gates of the attention's output scale the value path.
_GATES = (
    Rule("*.{self_attn,self_attention,attention,attn}.{gate_proj,g_proj,output_gate,o_gate}.*", VO),
    Rule("*.{gate_proj,g_proj,output_gate,o_gate,gate}.*", VO, within="*Attention/Linear/"),
    Rule("*.gate_proj.*", VO, within="*Attention/*GatedProjection/*"),
    Rule("*.{gate_bias,s_gate,v_bias}", VO, within=WITHIN),
    Rule("*{attn,attention}*.v_bias", VO, tail=2),
    Rule("*.exclusive_self_attention.alpha", VO),
    Rule("*.compressor.{kv_proj,gate_proj}.*", VO),  # DeepSeek V4: weighs several tokens' k and v into one
)
LATENT_ATTENTION = (
    Rule("*.{q_a_proj,wq_a}.*", QK),
    Rule("*.{q_b_proj}.*", QK, heads="q"),
    Rule("*.q_gate_proj.*", special=_gated_query),
    Rule("*.kv_a_proj_with_mqa.*", special=_latent_down),
    Rule("*.kv_b_proj.*", special=_latent_up),
    # DeepSeek V4: one head that is key and value at once
    Rule("*.kv_proj.*", VO, heads="kv", role="k and v", within="*DeepseekV4Attention/*"),
    Rule("*.{o_a_proj,o_b_proj}.*", VO),
)
_FUSED = (
    # keys and values alone: cross-attention whose queries are of other tokens
    Rule("*.{crossattention,cross_attention,cross_attn,encoder_attn}.c_attn.*", split=("k", "v")),
    Rule("*.{to_kv,kv,key_value}.{weight,bias}", split=("k", "v"), within=WITHIN),
    Rule("*.kv_proj.{weight,bias}", split=("k", "v"), within="*JetMoeAttention/*"),
    Rule("*.c_attn.*", split=QKV),
    Rule("*.qk.{weight,bias}", split=("q", "k"), within=WITHIN),
    Rule("*.attn_pool.kv.{weight,bias}", split=("k", "v")),
    Rule("*.{qkv,kv}.linear.*", special=_levit, within="*{Attention,AttentionDownsample}/LinearNorm/*"),
    Rule("*.qkv.{weight,bias}", special=_global_window, within="*WindowAttentionGlobal/*"),
    Rule("*.in_proj.weight", special=_parallel_scaling, within="*ParallelScalingBlock/*"),
    Rule("*.{attn,factoratt_crpe}.to_qkv.*", split=QKV),
    Rule("*.to_qkv.*", split=QKV, within=WITHIN),
    # all q, all k, all v: timm and the vision towers after it
    Rule("*.{attn,self_attn,attention,self_attention}.qkv.*", split=QKV),
    Rule("*.qkv.{weight,bias}", split=QKV, within=WITHIN),
    # torch.nn.MultiheadAttention, which its class tells where there are modules
    Rule("*.{attn,self_attn,attention,self_attention}.{in_proj_weight,in_proj_bias}", split=QKV),
    Rule("*.Wqkv.*", split=QKV),  # flash-attn's order, and ModernBERT, MPT and DBRX after it
    Rule("*.att_proj.*", split=QKV, within="*Bark*"),
    Rule("*.{queries_keys_values,keys_values}.linear.*", special=_levit, within=WITHIN),
    Rule("*.queries.linear.*", QK, heads="q", within=WITHIN),
    Rule("*.q.ln.{linear,c}.*", QK, heads="q", within="*AttentionDownsample/*"),
)
_CROSS = (
    "{attention,self_attention,self_attn,crossattention,cross_attention,cross_attn,encoder_attn,multihead_attn,attn}"
)
_PROJECTIONS = (
    Rule("*.bottleneck.{input,attention}.dense.*", FFN),  # MobileBERT's, before its attention and FFNs
    Rule("*.{q_proj,wq,Wq,q_attn,q_lin,to_q}{,.linear}.{weight,bias}*", QK, heads="q"),
    Rule("*.{k_proj,wk,Wk,k_attn,k_lin,to_k}{,.linear}.{weight,bias}*", QK, heads="kv"),
    Rule("*.{q_proj,wq,k_proj,wk}.*", QK),
    Rule("*.{v_proj,wv,Wv,v_attn,v_lin,to_v,v_proj_current,v_proj_delayed,v_sconv}.*", VO),
    # the down projection of T5's and ModernBERT's feed-forward networks
    Rule("*{DenseReluDense,mlp,ffn,feed_forward}.{wo,Wo}.*", FFN),
    Rule("*.{wo,Wo}.*", FFN, within="*{DenseActDense,DenseGatedActDense,MLP,Mlp,FeedForward,FFN}/*"),
    Rule("*.{o_proj,wo,Wo,attn_out_proj}.*", VO),
    Rule("*.{merge,project}.*", VO, within="*MultiHeadAttention/*"),  # torchvision's MaxViT
    Rule("*.attn.project.*", VO),  # and MViT
    Rule("*", VO, within="*{SelfOutput,AttentionOutput}/*"),
    Rule(f"*.{_CROSS}.{{c_proj,out_proj,out_lin}}.*", VO),
    Rule(f"*.{_CROSS}.{{dense,output.dense,dense_bias}}*", VO),
    *_short("query,q,query_proj,project_q,q_head,linear_q,to_query,query_key,projection_query", QK, "q"),
    *_short("query_global,e2e_query,e2w_query,w2e_query", QK, "q"),  # Longformer's global tokens, LUKE's entities
    *_short("key,k,key_proj,project_k,k_head,linear_k,to_key,projection_key,key_global,key_protein", QK, "kv"),
    *_short("value,v,value_proj,project_v,v_head,linear_v,projection_value,value_global,value_protein", VO),
    *_short("o,out,output,out_proj,out_lin,o_head,post_proj,attention_out,proj,projection,proj_out", VO),
    *_short("projection_layer,linear_out,dense,final,project_o,c_proj", VO),
    Rule("*.{to_out,to_output,projection}.*", VO, within=WITHIN),
    # JetMoE's mixture of attention heads: experts of (outputs, inputs)
    Rule("*.experts.input_linear.weight", QK, batch_dims=1, within="*MoA/*"),
    Rule("*.experts.output_linear.weight", VO, batch_dims=1, within="*MoA/*"),
    Rule("*.experts.bias", VO, within="*MoA/"),
    # whole tensors without modules of their own (XLNet): (width, heads, head size)
    Rule("*.rel_attn.{q,k}", QK),
    Rule("*.rel_attn.{v,o}", VO),
    Rule("*.post_attention.conv1d.*", VO),
    Rule("*.convolution_projection_{query,key}.*", QK),
    Rule("*.convolution_projection_value.*", VO),
    Rule("*.{sequence_reduction,spatial_reduction}.*", VO, within=WITHIN),  # of the tokens that k and v are made of
    # ConvBERT mixes neighbours by a softmax over a kernel that query and key make
    Rule("*.{key_conv_attn_layer,conv_kernel_layer}.*", QK, within=WITHIN),
    Rule("*.conv_out_layer.*", VO, within=WITHIN),
    Rule("*.fsmn.*", VO, within=WITHIN),
)
ATTENTION = (*_SCORES, *LATENT_ATTENTION, *_GATES, *_FUSED, *_PROJECTIONS)
