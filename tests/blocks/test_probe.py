"""The probe sees what attention is made of, and every fused layout of the tables is what the probe sees.

Head counts do not divide luckily: 3 heads, 1 key head, head size 12, unless the family forbids it.
"""

import pytest
import torch
import transformers
from torch import nn

from blockwise_lr import BlockError, map_blocks
from blockwise_lr.blocks import UnmappedParameterError
from blockwise_lr.probe import _watched, contradictions, probe

NO_TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
TEXT = dict(
    vocab_size=50,
    hidden_size=36,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=12,
    **NO_TOKENS,
)
GPT = dict(vocab_size=50, n_embd=36, n_head=3, n_layer=2, **NO_TOKENS)
PLAIN = dict(
    vocab_size=50, hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, **NO_TOKENS
)
LATENT = dict(
    num_key_value_heads=3,
    kv_lora_rank=10,
    q_lora_rank=14,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=2,
)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
FULL = dict(layer_types=["full_attention"] * 2)

# architecture, config, the fused weight of the first layer
FUSED = {
    "gpt2": ("GPT2LMHeadModel", GPT, "attn.c_attn"),
    "gpt_bigcode multi-query": ("GPTBigCodeForCausalLM", GPT, "attn.c_attn"),
    "gpt_bigcode multi-head": ("GPTBigCodeForCausalLM", {**GPT, "multi_query": False}, "attn.c_attn"),
    "gpt_neox": ("GPTNeoXForCausalLM", PLAIN, "attention.query_key_value"),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", {**PLAIN, "intermediate_multiple_size": 1}, "query_key_value"),
    "bloom": (
        "BloomForCausalLM",
        dict(vocab_size=50, hidden_size=36, n_head=3, n_layer=2, **NO_TOKENS),
        "query_key_value",
    ),
    "persimmon": ("PersimmonForCausalLM", PLAIN, "self_attn.query_key_value"),
    "falcon new": (
        "FalconForCausalLM",
        {**PLAIN, "num_kv_heads": 1, "new_decoder_architecture": True},
        "query_key_value",
    ),
    "falcon multi-query": ("FalconForCausalLM", {**PLAIN, "new_decoder_architecture": False}, "query_key_value"),
    "falcon multi-head": (
        "FalconForCausalLM",
        {**PLAIN, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False},
        "query_key_value",
    ),
    "mpt": ("MptForCausalLM", dict(vocab_size=50, d_model=36, n_heads=3, n_layers=2), "attn.Wqkv"),
    "phi3": ("Phi3ForCausalLM", TEXT, "qkv_proj"),
    "codegen, 8 heads": ("CodeGenForCausalLM", {**GPT, "n_embd": 96, "n_head": 8, "rotary_dim": 6}, "attn.qkv_proj"),
    "codegen, 4 heads": ("CodeGenForCausalLM", {**GPT, "n_embd": 48, "n_head": 4, "rotary_dim": 6}, "attn.qkv_proj"),
    "qwen3_next": ("Qwen3NextForCausalLM", {**TEXT, **EXPERTS, **FULL}, "self_attn.q_proj"),
    "qwen3_5": ("Qwen3_5ForCausalLM", {**TEXT, **FULL}, "self_attn.q_proj"),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", {**TEXT, **EXPERTS, **FULL}, "self_attn.q_proj"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**PLAIN, **LATENT}, "self_attn.kv_b_proj"),
    "modernbert": ("ModernBertForMaskedLM", {**PLAIN, **FULL}, "attn.Wqkv"),
    "deberta": ("DebertaForMaskedLM", {**PLAIN, "pad_token_id": 0}, "attention.self.in_proj"),
    "jetmoe": (
        "JetMoeForCausalLM",
        dict(vocab_size=50, hidden_size=36, num_hidden_layers=2, num_key_value_heads=3, kv_channels=12, **NO_TOKENS)
        | dict(intermediate_size=40, num_local_experts=2, num_experts_per_tok=1),
        "self_attention.kv_proj",
    ),
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        dict(
            TEXT,
            vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
            audio_config=dict(hidden_size=24, intermediate_size=32, num_blocks=1, num_attention_heads=2)
            | dict(ext_pw_out_channel=24, depthwise_separable_out_channel=24, nemo_conv_channels=24),
        ),
        "layers.0.self_attn.qkv_proj",
    ),
    "fuyu": ("FuyuForCausalLM", dict(text_config=dict(PLAIN, model_type="persimmon")), "self_attn.query_key_value"),
    "dbrx": (
        "DbrxForCausalLM",
        dict(vocab_size=50, d_model=36, n_heads=3, n_layers=2, max_seq_len=16, pad_token_id=None)
        | dict(attn_config=dict(kv_n_heads=1, clip_qkv=80.0, rope_theta=1e4))
        | dict(ffn_config=dict(hidden_size=36, ffn_hidden_size=40, moe_num_experts=2, ffn_act_fn={"name": "silu"})),
        "norm_attn_norm.attn.Wqkv",
    ),
    "bark": (
        "BarkSemanticModel",
        dict(input_vocab_size=50, output_vocab_size=50, hidden_size=36, num_heads=3, num_layers=2, block_size=16),
        "attn.att_proj",
    ),
    "a.x k2": (
        "AXK2ForCausalLM",
        dict(PLAIN, **LATENT, index_topk=4, index_head_dim=8, index_n_heads=2, gated_norm_rank=4)
        | dict(mlp_layer_types=["dense", "dense"]),
        "self_attn.kv_b_proj",
    ),
    "levit": (
        "LevitForImageClassification",
        dict(image_size=32, patch_size=16, hidden_sizes=[24, 36, 36], num_attention_heads=[3, 3, 3], depths=[1, 1, 1])
        | dict(key_dim=[4, 4, 4], attention_ratio=[2, 2, 2]),
        "queries_keys_values.linear",
    ),
}


def build(architecture, config, attention="eager"):
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    values = cls.config_class(**config)
    values._attn_implementation = attention
    model = cls(values).eval()
    with torch.no_grad():
        for p in model.parameters():  # not at its initialization, where some scales are 0
            p.normal_(0, 0.3) if p.dim() > 1 else p.normal_(1, 0.2)
    return model


def run(model):
    if model.main_input_name == "pixel_values":
        return lambda: model(torch.ones(1, 3, 32, 32).cumsum(-1))
    ids = torch.arange(7)[None] + 1
    return lambda: model(ids, use_cache=False) if hasattr(model.config, "use_cache") else model(ids)


def fused_weight(model, part):
    return next(name for name, _ in model.named_parameters() if f"{part}.weight" in name)


@pytest.mark.parametrize("case", FUSED)
def test_rows_feed_what_the_map_calls_them(case):
    """Row by row, of the weight and its bias: q and k feed the scores alone, v the values alone, a gate neither."""
    architecture, config, part = FUSED[case]
    model = build(architecture, config)
    block_map, uses = map_blocks(model), probe(model, run(model))
    assert contradictions(block_map, uses) == []
    weight = fused_weight(model, part)
    layout, use = block_map[weight], uses[weight]
    roles = set()
    for start, end, piece in layout.spans():
        scores, values = (f[:, start:end] if layout.transposed else f[start:end] for f in (use.scores, use.values))
        roles.add(piece.role)
        feeds = {"q": (True, False), "k": (True, False), "v": (False, True), "gate": (False, False)}[piece.role]
        units = 0 if layout.transposed else 1
        assert torch.equal(scores.any(units), torch.full((end - start,), feeds[0])), (piece, start)
        assert torch.equal(values.any(units), torch.full((end - start,), feeds[1])), (piece, start)
    assert len(roles) > 1 and len(layout.blocks) == 2


def first_attention(model):
    """Scores (or queries and keys) and values of the first layer."""
    with _watched(model, set()) as watch:
        run(model)()
    return [t.detach().clone() for t in watch.seen[0].scores], [t.detach().clone() for t in watch.seen[0].values]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("case", FUSED)
def test_zeroed_rows_take_away_what_they_are_and_nothing_else(case):
    architecture, config, part = FUSED[case]
    for role in ("q", "k", "v", "gate"):
        model = build(architecture, config)
        block_map, weight = map_blocks(model), fused_weight(model, part)
        if case == "levit":  # whose norm comes between a row and what it is for
            model.get_parameter(weight.replace("linear.weight", "batch_norm.bias")).data.zero_()
        spans = [(a, b) for a, b, piece in block_map[weight].spans() if piece.role == role]
        scores, values = first_attention(model)
        names = [name for name in (weight, weight.removesuffix("weight") + "bias") if name in block_map]
        with torch.no_grad():
            for a, b in spans:
                for p in map(model.get_parameter, names):
                    (p[..., a:b] if block_map[weight].transposed else p[a:b]).zero_()
            if case == "deberta" and role == "v":  # whose bias stands alone
                model.get_parameter(weight.replace("in_proj.weight", "v_bias")).zero_()
        if spans:
            without = first_attention(model)
            assert equal(scores, without[0]) is (role in ("v", "gate"))
            assert equal(values, without[1]) is (role != "v")
            assert role != "v" or all(not t.any() for t in without[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_projections(attention, device):
    model = build("LlamaForCausalLM", TEXT, attention).to(device)
    mask = torch.zeros(1, 1, 7, 7, device=device)  # four dimensions are taken as they are, also without data
    ids = torch.ones(1, 7, dtype=torch.long, device=device)
    uses = probe(model, lambda: model(ids, attention_mask=mask, use_cache=False))
    found = {name.rpartition("self_attn.")[2]: (bool(u.scores.any()), bool(u.values.any())) for name, u in uses.items()}
    assert found == {
        "q_proj.weight": (True, False),
        "k_proj.weight": (True, False),
        "v_proj.weight": (False, True),
        "o_proj.weight": (False, False),
    }
    assert len(uses) == 8  # of both layers, each without the other's


def test_a_wrong_rule_is_contradicted():
    model = build("LlamaForCausalLM", TEXT)
    swapped = [{"match": "*.layers.1.*.v_proj.*", "block": "qk"}, {"match": "*.layers.0.*.k_proj.*", "block": "vo"}]
    found = contradictions(map_blocks(model, rules=swapped), probe(model, run(model)))
    assert [(c.parameter, c.where, c.block.value, c.feeds) for c in found] == [
        ("model.layers.0.self_attn.k_proj.weight", "rows 0–11", "vo", "scores"),
        ("model.layers.1.self_attn.v_proj.weight", "rows 0–11", "qk", "values"),
    ]
    interleaved = [{"match": "*.qkv_proj.*", "split": ["q", "k", "v"], "interleave": "group"}]
    grouped = build("Phi3ForCausalLM", {**TEXT, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 72})
    assert contradictions(map_blocks(grouped, rules=interleaved), probe(grouped, run(grouped)))


def test_keys_that_are_values_feed_both():
    config = dict(TEXT, global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True)
    config |= dict(hidden_size_per_layer_input=0, layer_types=["sliding_attention", "full_attention"])
    model = build("Gemma4ForCausalLM", config)
    uses = probe(model, run(model))
    shared = uses["model.layers.1.self_attn.k_proj.weight"]
    assert shared.scores.any(1).all() and shared.values.any(1).all()
    assert contradictions(map_blocks(model), uses) == []


def test_a_model_without_attention_says_so():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(BlockError, match="no attention was seen in the forward pass"):
        probe(model, lambda: model(torch.ones(2, 3)))
    with pytest.raises(BlockError, match="which failed: mat1 and mat2"):
        probe(model, lambda: model(torch.ones(2, 4)))
    with pytest.raises(UnmappedParameterError):
        map_blocks(model)
