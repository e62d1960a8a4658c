"""Names of code that is in no package: by name and shape alone, as ``BlockwiseAdamW(model.named_parameters())`` sees them."""

import pytest

from blockwise_lr.blocks import HeadCounts, map_names

W, V = 24, 50
SQUARE, VECTOR, TABLE = (W, W), (W,), (V, W)
HEADS = HeadCounts(4, 4, {})

PAPER_GPT2 = {  # the official code of Blockwise LR and Adam-mini
    "transformer.wte.weight": (TABLE, "embedding"),
    "transformer.wpe.weight": (TABLE, "embedding"),
    "transformer.h.0.ln_1.weight": (VECTOR, "norm"),
    "transformer.h.0.attn.q_attn.weight": (SQUARE, "qk"),
    "transformer.h.0.attn.q_attn.bias": (VECTOR, "qk"),
    "transformer.h.0.attn.k_attn.weight": (SQUARE, "qk"),
    "transformer.h.0.attn.v_attn.weight": (SQUARE, "vo"),
    "transformer.h.0.attn.c_proj.weight": (SQUARE, "vo"),
    "transformer.h.0.mlp.c_fc.weight": ((4 * W, W), "ffn"),
    "transformer.h.0.mlp.c_proj.weight": ((W, 4 * W), "ffn"),
    "transformer.ln_f.weight": (VECTOR, "norm"),
    "lm_head.weight": (TABLE, "head"),
}
FAIRSEQ = {
    "encoder.embed_tokens.weight": (TABLE, "embedding"),
    "encoder.embed_positions.weight": (TABLE, "embedding"),
    "encoder.layernorm_embedding.weight": (VECTOR, "norm"),
    "encoder.layers.0.self_attn.k_proj.weight": (SQUARE, "qk"),
    "encoder.layers.0.self_attn.v_proj.bias": (VECTOR, "vo"),
    "encoder.layers.0.self_attn.q_proj.weight": (SQUARE, "qk"),
    "encoder.layers.0.self_attn.out_proj.weight": (SQUARE, "vo"),
    "encoder.layers.0.self_attn_layer_norm.bias": (VECTOR, "norm"),
    "encoder.layers.0.fc1.weight": ((4 * W, W), "ffn"),
    "encoder.layers.0.fc2.bias": (VECTOR, "ffn"),
    "encoder.layers.0.final_layer_norm.weight": (VECTOR, "norm"),
    "decoder.layers.0.encoder_attn.q_proj.weight": (SQUARE, "qk"),
    "decoder.layers.0.encoder_attn.out_proj.weight": (SQUARE, "vo"),
    "decoder.output_projection.weight": (TABLE, "head"),
}
TIMM = {
    "cls_token": ((1, 1, W), "embedding"),
    "pos_embed": ((1, 17, W), "embedding"),
    "patch_embed.proj.weight": ((W, 3, 4, 4), "embedding"),
    "blocks.0.norm1.weight": (VECTOR, "norm"),
    "blocks.0.attn.proj.weight": (SQUARE, "vo"),
    "blocks.0.ls1.gamma": (VECTOR, "norm"),
    "blocks.0.mlp.fc1.weight": ((4 * W, W), "ffn"),
    "norm.weight": (VECTOR, "norm"),
    "head.weight": (TABLE, "head"),
}
TIMM_OTHERS = {  # Swin; BEiT and XCiT; EVA; distilled DeiT; SigLIP's pooling by attention
    "patch_embed.norm.weight": (VECTOR, "norm"),
    "layers.0.blocks.0.attn.relative_position_bias_table": ((49, 4), "qk"),
    "layers.0.blocks.0.mlp.fc1.bias": ((4 * W,), "ffn"),
    "layers.1.downsample.reduction.weight": ((2 * W, 4 * W), "ffn"),
    "head.fc.weight": (TABLE, "head"),
    "blocks.0.gamma_1": (VECTOR, "norm"),
    "blocks.0.gamma3": (VECTOR, "norm"),
    "blocks.0.attn.temperature": ((4, 1, 1), "qk"),
    "blocks.0.attn.q_proj.weight": (SQUARE, "qk"),
    "blocks.0.attn.v_proj.bias": (VECTOR, "vo"),
    "blocks.0.attn.q_bias": (VECTOR, "qk"),
    "blocks.0.attn.v_bias": (VECTOR, "vo"),
    "rel_pos_bias.relative_position_bias_table": ((49, 4), "qk"),
    "reg_token": ((1, 4, W), "embedding"),
    "blocks.0.mlp.fc1_g.weight": ((4 * W, W), "ffn"),
    "blocks.0.mlp.norm.weight": ((4 * W,), "norm"),
    "fc_norm.bias": (VECTOR, "norm"),
    "dist_token": ((1, 1, W), "embedding"),
    "head_dist.weight": (TABLE, "head"),
    "attn_pool.latent": ((1, 1, W), "embedding"),
    "attn_pool.q.weight": (SQUARE, "qk"),
    "attn_pool.proj.weight": (SQUARE, "vo"),
    "attn_pool.mlp.fc2.weight": ((W, 4 * W), "ffn"),
}
TORCHVISION = {  # ViT, whose attention is torch's own; MViT's positions
    "class_token": ((1, 1, W), "embedding"),
    "conv_proj.weight": ((W, 3, 4, 4), "embedding"),
    "encoder.pos_embedding": ((1, 17, W), "embedding"),
    "encoder.layers.encoder_layer_0.ln_1.weight": (VECTOR, "norm"),
    "encoder.layers.encoder_layer_0.self_attention.out_proj.weight": (SQUARE, "vo"),
    "encoder.layers.encoder_layer_0.mlp.0.weight": ((4 * W, W), "ffn"),
    "encoder.ln.bias": (VECTOR, "norm"),
    "heads.head.weight": (TABLE, "head"),
    "pos_encoding.spatial_pos": ((16, W), "embedding"),
}
DEEPSPEED_MOE = {
    "layers.0.mlp.deepspeed_moe.gate.wg.weight": ((4, W), "router"),
    "layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.0.fc1.weight": ((4 * W, W), "ffn"),
}
PLAIN_BERT = {
    "encoder.layer.0.attention.self.query.weight": (SQUARE, "qk"),
    "encoder.layer.0.attention.self.value.bias": (VECTOR, "vo"),
    "encoder.layer.0.attention.output.dense.weight": (SQUARE, "vo"),
    "encoder.layer.0.crossattention.output.dense.weight": (SQUARE, "vo"),
    "encoder.layer.0.output.dense.weight": ((W, 4 * W), "ffn"),
    "encoder.layer.0.attention.output.LayerNorm.weight": (VECTOR, "norm"),
}

MEGATRON_BERT = {
    "embedding.tokentype_embeddings.weight": ((2, W), "embedding"),
    "encoder.layers.0.self_attention.linear_proj.weight": (SQUARE, "vo"),
    "encoder.layers.0.mlp.linear_fc1.bias": ((4 * W,), "ffn"),
    "lm_head.dense.weight": (SQUARE, "head"),
    "lm_head.layer_norm.bias": (VECTOR, "norm"),
    "output_layer.bias": ((50,), "head"),
    "pooler.dense.weight": (SQUARE, "head"),
    "binary_head.weight": ((2, W), "head"),
    "binary_head.bias": ((2,), "head"),
}


@pytest.mark.parametrize(
    "known", [PAPER_GPT2, FAIRSEQ, TIMM, TIMM_OTHERS, TORCHVISION, DEEPSPEED_MOE, PLAIN_BERT, MEGATRON_BERT]
)
def test_names_alone(known):
    family = "megatron" if known is MEGATRON_BERT else None
    mapped = map_names({name: shape for name, (shape, _) in known.items()}, heads=HEADS, family=family)
    assert {name: str(p.blocks[0]) for name, p in mapped.items()} == {name: block for name, (_, block) in known.items()}
    assert all(len(layout.blocks) == 1 for layout in mapped.values())


def test_fused_weights_of_vision_transformers():
    layout = map_names({"blocks.0.attn.qkv.weight": (3 * W, W)}, heads=HEADS)["blocks.0.attn.qkv.weight"]
    assert [(p.block.value, p.size, p.unit) for p in layout.pieces] == [("qk", W, 6), ("qk", W, 6), ("vo", W, 1)]
    torchs = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"  # torchvision's, without its modules
    assert map_names({torchs: (3 * W, W)}, heads=HEADS)[torchs].pieces == layout.pieces
    pooling = map_names({"attn_pool.kv.weight": (2 * W, W)}, heads=HEADS)["attn_pool.kv.weight"]
    assert [(p.role, p.size, p.unit) for p in pooling.pieces] == [("k", W, 6), ("v", W, 1)]


def test_positions_and_tokens_are_rows():
    """(1, tokens, width): a row a position, as in an embedding's table."""
    layout = map_names({"pos_embed": (1, 17, W)})["pos_embed"]
    assert (layout.outputs, layout.inputs, layout.batch_dims, layout.kind) == (17, W, 1, "matrix")
