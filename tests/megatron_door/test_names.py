"""Which rows of Megatron's parameters are which block, by hand."""

import pytest

from blockwise_lr.blocks import BlockError, HeadCounts, head_counts, map_names

GQA = {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 4, "tensor_model_parallel_size": 2}
LAYER = "decoder.layers.0."


def spans(name, shape, config):
    layout = map_names({name: shape}, heads=head_counts(config), family="megatron")[name]
    return [(start, end, piece.block.value, piece.role) for start, end, piece in layout.spans()]


def test_fused_qkv_per_query_group_of_this_slice():
    """8 heads and 4 groups on 2 ranks: a slice holds 2 groups of [2 q heads, k, v], 4 rows each."""
    assert spans(LAYER + "self_attention.linear_qkv.weight", (32, 32), GQA) == [
        (0, 8, "qk", "q"),
        (8, 12, "qk", "k"),
        (12, 16, "vo", "v"),
        (16, 24, "qk", "q"),
        (24, 28, "qk", "k"),
        (28, 32, "vo", "v"),
    ]


def test_fused_qkv_with_output_gate():
    gated = {**GQA, "attention_output_gate": True}
    assert spans(LAYER + "self_attention.linear_qkv.bias", (48,), gated)[:4] == [
        (0, 8, "qk", "q"),
        (8, 16, "vo", "gate"),
        (16, 20, "qk", "k"),
        (20, 24, "vo", "v"),
    ]


def test_latent_attention():
    config = {
        **GQA,
        "tensor_model_parallel_size": 1,
        "num_query_groups": 8,
        "qk_head_dim": 4,
        "v_head_dim": 2,
        "kv_lora_rank": 16,
        "qk_pos_emb_head_dim": 4,
        "q_lora_rank": 12,
    }
    up = spans(LAYER + "self_attention.linear_kv_up_proj.weight", (48, 16), config)
    assert up[:3] == [(0, 4, "qk", "k"), (4, 6, "vo", "v"), (6, 10, "qk", "k")] and len(up) == 16
    assert spans(LAYER + "self_attention.linear_kv_down_proj.weight", (20, 32), config) == [
        (0, 16, "vo", "latent"),
        (16, 20, "qk", "k"),
    ]
    assert [span[:3] for span in spans(LAYER + "self_attention.linear_qkv_down_proj.weight", (32, 32), config)] == [
        (0, 12, "qk"),
        (12, 28, "vo"),
        (28, 32, "qk"),
    ]


@pytest.mark.parametrize(
    "parts, rank, rows, wanted",
    [
        (2, 0, 10, [(0, 10, "vo")]),
        (2, 1, 10, [(0, 6, "vo"), (6, 10, "qk")]),
        (4, 3, 5, [(0, 1, "vo"), (1, 5, "qk")]),
        (10, 8, 2, [(0, 2, "qk")]),
        (2, None, 10, [(0, 10, "vo")]),
    ],
)
def test_slices_of_latent_attentions_down_projection(parts, rank, rows, wanted):
    """16 rows of the latent, then 4 of the rotary key, cut evenly; without its rank a slice has the latent's rate."""
    config = {
        "num_attention_heads": 20,
        "kv_lora_rank": 16,
        "qk_pos_emb_head_dim": 4,
        "tensor_model_parallel_size": parts,
        "tensor_model_parallel_rank": rank,
    }
    found = spans(LAYER + "self_attention.linear_kv_down_proj.weight", (rows, 32), config)
    assert [span[:3] for span in found] == wanted


@pytest.mark.parametrize(
    "name, shape, block",
    [
        ("embedding.word_embeddings.weight", (64, 32), "embedding"),
        ("embedding.position_embeddings.weight", (16, 32), "embedding"),
        ("output_layer.weight", (64, 32), "head"),
        (LAYER + "self_attention.linear_qkv.layer_norm_weight", (32,), "norm"),
        (LAYER + "self_attention.q_layernorm.weight", (4,), "norm"),
        (LAYER + "self_attention.kv_layernorm.weight", (16,), "norm"),
        (LAYER + "self_attention.linear_proj.weight", (32, 16), "vo"),
        (LAYER + "self_attention.linear_q_down_proj.weight", (12, 32), "qk"),
        (LAYER + "mlp.linear_fc1.layer_norm_bias", (32,), "norm"),
        (LAYER + "mlp.linear_fc1.weight", (96, 32), "ffn"),
        (LAYER + "mlp.router.weight", (4, 32), "router"),
        (LAYER + "mlp.experts.local_experts.1.linear_fc2.weight", (32, 24), "ffn"),
        (LAYER + "mlp.experts.linear_fc1.weight3", (48, 32), "ffn"),
        (LAYER + "mlp.shared_experts.linear_fc1.weight", (48, 32), "ffn"),
        (LAYER + "mlp.shared_experts.gate_weight", (1, 32), "router"),
        (LAYER + "mlp.fc1_latent_proj.weight", (16, 32), "ffn"),
        (LAYER + "self_attention.core_attention.softmax_offset", (4,), "qk"),
        (LAYER + "self_attention.core_attention.indexer.linear_wq_b.weight", (16, 12), "qk"),
        (LAYER + "self_attention.core_attention.indexer.k_norm.weight", (16,), "norm"),
        ("mtp.layers.0.eh_proj.weight", (32, 64), "ffn"),
        ("mtp.layers.0.hnorm.weight", (32,), "norm"),
        (LAYER + "mixer.in_proj.weight", (80, 32), "ssm"),
        (LAYER + "mixer.in_proj.layer_norm_weight", (32,), "norm"),
        (LAYER + "mixer.A_log", (4,), "ssm"),
        (LAYER + "mixer.norm.weight", (32,), "norm"),
        ("language_model.encoder.layers.0.attention.dense.weight", (32, 32), "vo"),
        ("language_model.encoder.layers.0.mlp.dense_h_to_4h.weight", (96, 32), "ffn"),
        ("tied_modules.embed.word_embeddings.weight", (64, 32), "embedding"),
        ("3.self_attention.linear_proj.weight", (32, 16), "vo"),
    ],
)
def test_block_of_a_whole_parameter(name, shape, block):
    assert [span[2] for span in spans(name, shape, GQA)] == [block]


def test_tied_output_layer_of_another_stage_is_an_embedding():
    mapped = map_names({"output_layer.weight": (64, 32)}, family="megatron", copies=["output_layer.weight"])
    assert mapped["output_layer.weight"].blocks == ("embedding",)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(BlockError, match="8 query heads and 3 query groups do not divide over 4"):
        head_counts({"num_attention_heads": 8, "num_query_groups": 3, "tensor_model_parallel_size": 4})
    with pytest.raises(BlockError, match="num_query_groups = -2; give a number of heads, 1 or above"):
        head_counts({"num_attention_heads": 8, "num_query_groups": -2})
    assert head_counts({"num_attention_heads": 8}) == HeadCounts(8, 8, {"num_attention_heads": 8})


@pytest.mark.parametrize(
    "heads, groups, parts, rows, wanted",
    [
        # [q q q q k v] of one group: three heads a rank
        (4, 1, 2, 12, [[(0, 12, "q", 4)], [(0, 4, "q", 4), (4, 8, "k", 4), (8, 12, "v", 1)]]),
        # [q q k v] twice: two heads a rank
        (4, 2, 4, 8, [[(0, 8, "q", 4)], [(0, 4, "k", 4), (4, 8, "v", 1)]] * 2),
        # [q q q q k v] over four: one and a half heads a rank, so that what Adam-mini calls a head stays open
        (
            4,
            1,
            4,
            6,
            [[(0, 6, "q", None)]] * 2
            + [[(0, 4, "q", None), (4, 6, "k", None)], [(0, 2, "k", None), (2, 6, "v", None)]],
        ),
    ],
)
def test_fused_qkv_of_ranks_that_share_a_query_group(heads, groups, parts, rows, wanted):
    found = []
    for rank in range(parts):
        config = {
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "tensor_model_parallel_size": parts,
            "tensor_model_parallel_rank": rank,
        }
        layout = map_names(
            {LAYER + "self_attention.linear_qkv.weight": (rows, 32)}, heads=head_counts(config), family="megatron"
        )
        found.append(
            [(start, end, piece.role, piece.unit) for spans in layout.values() for start, end, piece in spans.spans()]
        )
    assert found == wanted


@pytest.mark.parametrize(
    "name, rank, words",
    [
        ("self_attention.linear_qkv.weight", None, "which part of a group this rank holds is not known"),
        ("attention.query_key_value.weight", 0, "known only of megatron-core's linear_qkv"),
    ],
)
def test_other_fused_weights_of_ranks_that_share_a_query_group_are_refused(name, rank, words):
    config = {
        "num_attention_heads": 4,
        "num_query_groups": 1,
        "tensor_model_parallel_size": 2,
        "tensor_model_parallel_rank": rank,
    }
    with pytest.raises(BlockError, match=words):
        map_names({LAYER + name: (24, 32)}, heads=head_counts(config), family="megatron")
