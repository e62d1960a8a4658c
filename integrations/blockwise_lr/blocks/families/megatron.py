"""Megatron's names and layouts: megatron-core 0.16 to 0.19, legacy Megatron-DeepSpeed, and hybrid Mamba models.

Sources: megatron.core.transformer.attention (SelfAttention.get_query_key_value_tensors for the row order of a fused
weight), multi_latent_attention, moe, multi_token_prediction, megatron.core.ssm.mamba_mixer; for the legacy names,
Megatron-DeepSpeed's megatron.model.transformer. Under tensor parallelism, layouts are those of this rank's slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..dims import HeadCounts, head_counts
from ..layout import Piece
from ..rules import Rule, qkv_pieces, required_heads
from ..types import BlockError, BlockType

EMBEDDING, HEAD, QK, VO, FFN, NORM, ROUTER, SSM = BlockType

Pieces = tuple[tuple[Piece, ...], int]


def _qkv(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """[q heads of a group, their output gates if the config has them, k, v] per query group."""
    roles = ("q", "gate", "k", "v") if heads.config.get("attention_output_gate") else ("q", "k", "v")
    if not heads.kv:
        return _part_of_a_group(shape[0], heads, roles), 1
    return qkv_pieces(shape[0], heads.q, heads.kv, "group", roles)


def _part_of_a_group(rows: int, heads: HeadCounts, roles: tuple[str, ...]) -> tuple[Piece, ...]:
    """The rows of one rank when several tensor-parallel ranks share a query group: an even split of all rows.

    If the split divides heads, the head size is left unknown on all ranks, and Adam-mini refuses the model.
    """
    parts, rank = heads.config["tensor_model_parallel_size"], heads.config.get("tensor_model_parallel_rank")
    if rank is None:
        raise BlockError(
            f"{parts} tensor-parallel ranks share fewer query groups, and which part of a group this rank "
            f"holds is not known; state tensor_model_parallel_rank in the config"
        )
    whole = required_heads(head_counts({**heads.config, "tensor_model_parallel_size": 1}))
    pieces, groups = qkv_pieces(rows * parts, whole.q, whole.kv, "group", roles)
    divides_heads = rows % pieces[-1].size != 0  # a head is as long as a group's v
    return tuple(
        replace(piece, size=size, unit=None if divides_heads else piece.unit)
        for piece, size in _run(pieces * groups, rank * rows, rows)
    )


def _kv_up(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """MLA: [k without positions, v] per head."""
    k, v = heads.config.get("qk_head_dim"), heads.config.get("v_head_dim")
    if not k or not v:
        raise BlockError(
            "linear_kv_up_proj needs the config's qk_head_dim and v_head_dim; pass map_blocks(model, config=…)"
        )
    return (Piece(QK, k, k, "k"), Piece(VO, v, 1, "v")), shape[0] // (k + v)


def _kv_down(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """MLA: [latent of k and v, rotary part of k, shared by all heads]."""
    return _down(shape[0], _latent_and_rotary(heads), heads), 1


def _qkv_down(shape: tuple[int, ...], heads: HeadCounts) -> Pieces:
    """MLA, fused: [latent of q, then the rows of :func:`_kv_down`]."""
    q = heads.config.get("q_lora_rank") or 0
    if not 0 < q < shape[0]:
        raise BlockError(f"linear_qkv_down_proj has {shape[0]} rows and the config's q_lora_rank is {q}; give a rule")
    return _down(shape[0], (Piece(QK, q, 1, "q"), *_latent_and_rotary(heads)), heads), 1


def _latent_and_rotary(heads: HeadCounts) -> tuple[Piece, ...]:
    latent, rotary = heads.config.get("kv_lora_rank") or 0, heads.config.get("qk_pos_emb_head_dim") or 0
    pieces = (Piece(VO, latent, 1, "latent"), Piece(QK, rotary, rotary, "k"))
    return tuple(piece for piece in pieces if piece.size)


def _down(rows: int, pieces: tuple[Piece, ...], heads: HeadCounts) -> tuple[Piece, ...]:
    """The pieces of ``rows`` rows of a down projection: all of it, or a tensor-parallel rank's slice.

    If a slice boundary divides the rotary key, Adam-mini treats each part as a head. If the rank is unknown, the whole
    slice is mapped to vo, the block type of the latent, which has the lower learning rate.
    """
    total, parts = sum(piece.size for piece in pieces), heads.config.get("tensor_model_parallel_size") or 1
    rank = 0 if rows == total else heads.config.get("tensor_model_parallel_rank")
    if rank is None or rows not in (total, total / parts):
        return (Piece(VO, rows, 1, "latent"),)
    return tuple(
        replace(piece, size=size, unit=None if piece.unit is None else min(piece.unit, size))
        for piece, size in _run(pieces, rank * rows, rows)
    )


def _run(pieces: tuple[Piece, ...], begin: int, rows: int) -> Iterator[tuple[Piece, int]]:
    """(piece, number of its rows) for the rows [begin, begin + rows) of contiguous pieces."""
    for piece in pieces:
        size = min(piece.size, begin + rows) - max(begin, 0)
        if size > 0:
            yield piece, size
        begin -= piece.size


def _per_expert(columns: int, heads: HeadCounts) -> tuple[int, int]:
    """(experts on this rank, columns per expert)."""
    experts = (heads.config.get("num_moe_experts") or 1) // (heads.config.get("expert_model_parallel_size") or 1)
    if columns % experts:
        raise BlockError(
            f"grouped experts' {columns} columns do not divide over the config's {experts} experts; give a rule"
        )
    return experts, columns // experts


def _weight1(shape: tuple[int, ...], heads: HeadCounts) -> tuple[int, ...]:
    """Legacy GroupedMLP: stored as (hidden, experts * ffn), viewed as (experts, hidden, ffn) in the forward pass."""
    experts, ffn = _per_expert(shape[1], heads)
    return experts, shape[0], ffn


def _weight2(shape: tuple[int, ...], heads: HeadCounts) -> tuple[int, ...]:
    """Legacy GroupedMLP: stored as (experts * ffn, hidden), viewed as (experts, ffn, hidden) in the forward pass."""
    return *_per_expert(shape[0], heads), shape[1]


MEGATRON: dict[str, tuple[Rule, ...]] = {
    "megatron": (
        # attention
        Rule("*.linear_qkv.{weight,bias}", special=_qkv),
        Rule("*.linear_q.{weight,bias}", QK, heads="q"),
        Rule("*.linear_kv.{weight,bias}", split=("k", "v"), interleave="group"),
        Rule("*.linear_proj.{weight,bias}", VO),
        # multi-latent attention
        Rule("*.{linear_q_proj,linear_q_up_proj}.{weight,bias}", QK, heads="q"),
        Rule("*.linear_q_down_proj.{weight,bias}", QK),
        Rule("*.linear_kv_down_proj.{weight,bias}", special=_kv_down),
        Rule("*.linear_qkv_down_proj.{weight,bias}", special=_qkv_down),
        Rule("*.linear_kv_up_proj.{weight,bias}", special=_kv_up),
        # feed-forward: dense, local and grouped experts (weight0, weight1, ...), shared experts, multi-token prediction
        Rule("*.{router,gate}.{weight,bias}", ROUTER),
        Rule("*.shared_experts.gate_weight", ROUTER),
        Rule("*.{linear_fc1,linear_fc2}.{weight,bias}*", FFN),
        Rule("*.experts.weight1", FFN, batch_dims=1, transposed=True, view=_weight1),
        Rule("*.experts.weight2", FFN, batch_dims=1, transposed=True, view=_weight2),
        Rule("*.{eh_proj,fc1_latent_proj,fc2_latent_proj}.{weight,bias}", FFN),
        # state-space mixers: Mamba's, and gated delta nets instead of self-attention
        Rule("*.{mixer,self_attention}.{in_proj,out_proj}.{weight,bias}", SSM),
        Rule("*.{mixer,self_attention}.{conv1d,conv1d_weight,conv1d_bias}*", SSM),
        Rule("*.{mixer,self_attention}.{A_log,D,dt_bias}", SSM, undecayed=True),
        # further inputs of the attention scores: learnt softmax offsets, the indexer of sparse attention
        Rule("*.core_attention.softmax_offset", QK),
        Rule("*.indexer.{linear_wq_b,linear_wk,linear_weights_proj}.weight", QK),
        # embeddings and output layers
        Rule("*.{word_embeddings,position_embeddings,tokentype_embeddings}.weight", EMBEDDING),
        Rule("*.tied_modules.{embed,embedding,embeddings,word_embeddings}.weight", EMBEDDING),
        Rule("*.{output_layer,lm_head,binary_head}.{weight,bias}", HEAD),  # the last is BERT's
        # Megatron-DeepSpeed and Megatron before its core
        Rule("*.query_key_value.{weight,bias}", split=("q", "k", "v"), interleave="group"),
        Rule("*.{attention,self_attention,inter_attention}.query.{weight,bias}", QK, heads="q"),
        Rule(
            "*.{attention,self_attention,inter_attention}.key_value.{weight,bias}", split=("k", "v"), interleave="group"
        ),
        Rule("*.{attention,self_attention,inter_attention}.dense.{weight,bias}", VO),
    )
}
