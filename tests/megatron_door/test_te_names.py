"""Names and shapes that Transformer Engine's modules have in Megatron's layer specs, and the block of each, by hand.

Transformer Engine does not import without a GPU, so the parameters are written from its source (2.20.0.dev0, August 2026):
Linear registers `weight` and `bias`, LayerNormLinear adds `layer_norm_weight` and `layer_norm_bias`, GroupedLinear registers
`weight0`, `bias0`, ... (or one `weight`, a GroupedTensor, with single_grouped_weight), DotProductAttention `softmax_offset`.
`_extra_state` is in state dicts, and no parameter.
"""

import pytest

from blockwise_lr.blocks import head_counts, map_names

CONFIG = {
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 4,
    "num_moe_experts": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_head_dim": 4,
    "v_head_dim": 2,
    "qk_pos_emb_head_dim": 4,
}
LATENT = {**CONFIG, "num_query_groups": 8}
D, FFN, LATENT_Q, LATENT_KV = 32, 48, 12, 16

# what gpt_layer_specs.py puts together -> (config, below which module, name -> (shape, blocks of its rows in order))
SPECS = {
    # TELayerNormColumnParallelLinear, TEDotProductAttention, TERowParallelLinear, TENorm for qk_layernorm
    "self-attention": (
        CONFIG,
        "self_attention.",
        {
            "linear_qkv.layer_norm_weight": ((D,), ["norm"]),
            "linear_qkv.layer_norm_bias": ((D,), ["norm"]),
            "linear_qkv.weight": ((64, D), ["qk", "vo"] * 4),
            "linear_qkv.bias": ((64,), ["qk", "vo"] * 4),
            "core_attention.softmax_offset": ((8,), ["qk"]),
            "q_layernorm.weight": ((4,), ["norm"]),
            "k_layernorm.weight": ((4,), ["norm"]),
            "linear_proj.weight": ((D, D), ["vo"]),
            "linear_proj.bias": ((D,), ["vo"]),
        },
    ),
    # its up projections are TELayerNormColumnParallelLinear with qk_layernorm, TEColumnParallelLinear without
    "multi-latent attention": (
        LATENT,
        "self_attention.",
        {
            "linear_q_down_proj.weight": ((LATENT_Q, D), ["qk"]),
            "linear_q_up_proj.layer_norm_weight": ((LATENT_Q,), ["norm"]),
            "linear_q_up_proj.weight": ((64, LATENT_Q), ["qk"]),
            "linear_kv_down_proj.weight": ((LATENT_KV + 4, D), ["vo", "qk"]),
            "linear_kv_up_proj.layer_norm_weight": ((LATENT_KV,), ["norm"]),
            "linear_kv_up_proj.layer_norm_bias": ((LATENT_KV,), ["norm"]),
            "linear_kv_up_proj.weight": ((48, LATENT_KV), ["qk", "vo"] * 8),
            "linear_q_proj.weight": ((64, D), ["qk"]),
            "linear_qkv_down_proj.layer_norm_weight": ((D,), ["norm"]),  # the input's norm, fused (0.19)
            "linear_qkv_down_proj.weight": ((LATENT_Q + LATENT_KV + 4, D), ["qk", "vo", "qk"]),
            "linear_proj.weight": ((D, 16), ["vo"]),
        },
    ),
    # TELayerNormColumnParallelLinear and TERowParallelLinear; TEFusedMLP holds the same parameters
    "dense feed-forward": (
        CONFIG,
        "mlp.",
        {
            "linear_fc1.layer_norm_weight": ((D,), ["norm"]),
            "linear_fc1.layer_norm_bias": ((D,), ["norm"]),
            "linear_fc1.weight": ((2 * FFN, D), ["ffn"]),
            "linear_fc1.bias": ((2 * FFN,), ["ffn"]),
            "linear_fc2.weight": ((D, FFN), ["ffn"]),
            "linear_fc2.bias": ((D,), ["ffn"]),
        },
    ),
    # TEColumnParallelGroupedLinear and TERowParallelGroupedLinear, and one GroupedTensor of all
    "grouped experts": (
        CONFIG,
        "mlp.",
        {
            "router.weight": ((4, D), ["router"]),
            "experts.linear_fc1.weight0": ((2 * FFN, D), ["ffn"]),
            "experts.linear_fc1.weight3": ((2 * FFN, D), ["ffn"]),
            "experts.linear_fc1.bias0": ((2 * FFN,), ["ffn"]),
            "experts.linear_fc2.weight1": ((D, FFN), ["ffn"]),
            "experts.linear_fc2.bias1": ((D,), ["ffn"]),
            "experts.linear_fc2.weight": ((4, D, FFN), ["ffn"]),
            "shared_experts.linear_fc1.weight": ((2 * FFN, D), ["ffn"]),
            "shared_experts.linear_fc1.layer_norm_weight": ((D,), ["norm"]),
        },
    ),
    # TENorm where it is not fused into the next linear
    "norms": (
        CONFIG,
        "",
        {
            "input_layernorm.weight": ((D,), ["norm"]),
            "pre_mlp_layernorm.weight": ((D,), ["norm"]),
            "pre_mlp_layernorm.bias": ((D,), ["norm"]),
        },
    ),
    # mamba_layer_specs.py: TELayerNormColumnParallelLinear and TERowParallelLinear
    "Mamba's mixer": (
        CONFIG,
        "mixer.",
        {
            "in_proj.layer_norm_weight": ((D,), ["norm"]),
            "in_proj.weight": ((80, D), ["ssm"]),
            "out_proj.weight": ((D, 40), ["ssm"]),
        },
    ),
}


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_of_transformer_engines_parameters(spec):
    config, below, parameters = SPECS[spec]
    prefix = f"decoder.layers.0.{below}"
    shapes = {prefix + name: shape for name, (shape, _) in parameters.items()}
    mapped = map_names(shapes, heads=head_counts(config), family="megatron")
    found = {}
    for name, layout in mapped.items():
        blocks = [piece.block.value for _, _, piece in layout.spans()]
        found[name.removeprefix(prefix)] = [one for one, before in zip(blocks, [None, *blocks]) if one != before]
    assert found == {name: blocks for name, (_, blocks) in parameters.items()}
