"""What names alone get wrong and modules tell: each on the module that transformers or torch runs."""

import pytest
import torch
import transformers
from torch import nn

from blockwise_lr import BlockError, map_blocks

SMALL = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=50,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def build(architecture, config=None, **values):
    cls = getattr(transformers, architecture)
    with torch.device("meta"):
        return cls(config or cls.config_class(**values))


def blocks_of(model, *parts, **options):
    """The block types of the parameters whose names hold all of these parts."""
    mapped = map_blocks(model, **options)
    found = {name: layout for name, layout in mapped.items() if all(part in name for part in parts)}
    assert found, list(mapped)[:40]
    return {str(block) for layout in found.values() for block in layout.blocks}


def units_of(model, *parts, **options):
    """The head sizes of the parameters whose names hold all of these parts."""
    mapped = map_blocks(model, **options)
    return {p.unit for name, layout in mapped.items() if all(part in name for part in parts) for p in layout.pieces}


def test_one_projection_that_makes_keys_and_values_is_vo():
    """Gemma 4 with attention_k_eq_v: full layers have no v_proj, key heads of their own number and size."""
    config = transformers.Gemma4TextConfig(
        **SMALL,
        global_head_dim=24,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = build("Gemma4ForCausalLM", config)
    assert model.model.layers[1].self_attn.v_proj is None
    k = {name: p for name, p in map_blocks(model).items() if name.endswith("self_attn.k_proj.weight")}
    (sliding,), (full,) = (layout.pieces for layout in k.values())
    assert (sliding.block.value, sliding.size, sliding.unit) == ("qk", 2 * 12, 12)
    assert (full.block.value, full.size, full.unit, full.role) == ("vo", 24, 24, "k and v")
    assert units_of(model, "layers.1.self_attn.q_proj") == {24}


@pytest.mark.parametrize("architecture", ["AfmoeForCausalLM", "HrmTextForCausalLM"])
def test_a_gate_of_the_attention_output_is_vo(architecture):
    model = build(architecture)
    assert blocks_of(model, "self_attn.gate_proj") == {"vo"}
    assert blocks_of(model, "mlp", "gate_proj") == {"ffn"}


class PreNorm(nn.Module):
    """lucidrains' wrapper: a norm before any module, whose attribute is all that names it."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(48), inner


def test_a_parent_called_norm_makes_nothing_a_norm():
    biased = transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)
    model = nn.ModuleDict({"normformer": build("LlamaForCausalLM", biased)})
    wanted = {name: layout.blocks for name, layout in map_blocks(model["normformer"]).items()}
    assert {name.removeprefix("normformer."): p.blocks for name, p in map_blocks(model).items()} == wanted
    assert blocks_of(model, "layers.0.self_attn.q_proj.bias") == {"qk"}
    attention = model["normformer"].model.layers[0].self_attn
    wrapped = nn.ModuleDict({"prenorm_attn": PreNorm(attention)})
    assert blocks_of(wrapped, "prenorm_attn.fn.v_proj.bias") == {"vo"}
    assert blocks_of(wrapped, "prenorm_attn.norm") == {"norm"}


def test_biases_below_roberta_prelayernorm_are_those_of_their_weights():
    model = build("RobertaPreLayerNormForMaskedLM")
    mapped = map_blocks(model)
    for name, layout in mapped.items():
        weight = name.removesuffix("bias") + "weight"
        if name.endswith("bias") and weight in mapped:
            assert layout.blocks == mapped[weight].blocks, name
    assert blocks_of(model, "LayerNorm") == {"norm"}


@pytest.mark.parametrize("architecture", ["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"])
def test_a_query_projection_that_holds_the_gate_is_both(architecture):
    model = build(architecture)
    heads, size = model.config.num_attention_heads, model.config.head_dim
    (layout,) = {p.pieces: p for n, p in map_blocks(model).items() if n.endswith("self_attn.q_proj.weight")}.values()
    assert [(p.block.value, p.size, p.unit) for p in layout.pieces] == [("qk", size, size), ("vo", size, 1)]
    assert layout.repeat == heads


@pytest.mark.parametrize(
    "architecture",
    ["MT5ForConditionalGeneration", "UMT5ForConditionalGeneration", "LongT5ForConditionalGeneration"]
    + ["SwitchTransformersForConditionalGeneration", "Pix2StructForConditionalGeneration"],
)
def test_wo_of_a_feed_forward_network(architecture):
    assert blocks_of(build(architecture), ".wo.weight") == {"ffn"}


def test_cross_attention_of_bert():
    config = transformers.BertConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=1, is_decoder=True, add_cross_attention=True
    )
    model = build("BertLMHeadModel", config)
    assert blocks_of(model, "crossattention.output.dense") == {"vo"}
    assert blocks_of(model, "crossattention.self.query") == blocks_of(model, "crossattention.self.key") == {"qk"}
    assert blocks_of(model, "layer.0.output.dense") == {"ffn"}


@pytest.mark.parametrize("heads, width", [(8, 768), (4, 48)])
def test_cross_attention_of_gpt2(heads, width):
    """c_attn of cross-attention is [k, v], q_attn the query; rows that divide by three heads' worth do not mislead."""
    config = transformers.GPT2Config(n_embd=width, n_head=heads, n_layer=1, add_cross_attention=True, vocab_size=50)
    model = build("GPT2LMHeadModel", config)
    mapped = map_blocks(model)
    layout = mapped["transformer.h.0.crossattention.c_attn.weight"]
    assert [(a, b, p.block.value, p.unit) for a, b, p in layout.spans()] == [
        (0, width, "qk", width // heads),
        (width, 2 * width, "vo", 1),
    ]
    assert layout.transposed
    q = mapped["transformer.h.0.crossattention.q_attn.weight"]
    assert q.transposed and [(p.block.value, p.unit) for p in q.pieces] == [("qk", width // heads)]
    assert blocks_of(model, "crossattention.c_proj") == {"vo"}
    assert len(mapped["transformer.h.0.attn.c_attn.weight"].spans()) == 3


def test_experts_stored_inputs_first():
    """AriaText: (experts, inputs, outputs)."""
    config = transformers.AriaTextConfig(**SMALL, moe_num_experts=3, moe_num_shared_experts=1, moe_topk=2)
    model = build("AriaTextForCausalLM", config)
    down = {n: p for n, p in map_blocks(model).items() if "experts.down_proj" in n and len(p.shape) == 3}
    assert down and all(p.transposed and p.batch_dims == 1 and p.outputs == 48 for p in down.values())


def test_a_projector_stored_inputs_first():
    """Gemma 3 computes x @ W, so its outputs, of the language model's width, are the columns."""
    model = build("Gemma3ForConditionalGeneration")
    (layout,) = [p for name, p in map_blocks(model).items() if name.endswith("mm_input_projection_weight")]
    assert layout.transposed and layout.outputs == model.config.text_config.hidden_size
    assert [str(b) for b in layout.blocks] == ["embedding"]


@pytest.mark.parametrize("architecture", ["OpenAIGPTLMHeadModel", "CTRLLMHeadModel"])
def test_a_tied_embedding_under_an_unknown_name(architecture):
    model = build(architecture)
    table = max((m for m in model.modules() if isinstance(m, nn.Embedding)), key=lambda m: m.num_embeddings)
    mapped = map_blocks(model)
    assert "head" not in {str(b) for p in mapped.values() for b in p.blocks} or architecture.startswith("CTRL")
    assert str(mapped[mapped.require_name(table.weight)].blocks[0]) == "embedding"


def test_an_embedding_is_one_whatever_it_is_called():
    model = nn.ModuleDict({"my_table": nn.Embedding(50, 48), "lm_head": nn.Linear(48, 50, bias=False)})
    model["lm_head"].weight = model["my_table"].weight
    assert [str(p.blocks[0]) for p in map_blocks(model).values()] == ["embedding"]


def test_layers_with_key_heads_of_their_own():
    """MiMo-V2-Flash: sliding layers have more key heads than full ones."""
    config = transformers.MiMoV2FlashConfig(num_hidden_layers=2)
    model = build("MiMoV2FlashForCausalLM", config)
    counted = {layer.self_attn.k_proj.weight.shape[0] // layer.self_attn.head_dim for layer in model.model.layers}
    assert len(counted) == 2 and units_of(model, "self_attn.k_proj") == {config.head_dim}
    assert units_of(model, "self_attn.q_proj") == {config.head_dim}


def test_encoder_and_decoder_with_other_numbers_of_heads():
    config = transformers.WhisperConfig(
        d_model=384, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=6
    )
    model = build("WhisperForConditionalGeneration", config)
    assert units_of(model, "encoder.layers", "q_proj.weight") == {384 // 4}
    assert units_of(model, "decoder.layers", "q_proj.weight") == {384 // 6}


@pytest.mark.parametrize(
    "architecture, part",
    [
        ("OlmoHybridForCausalLM", ".linear_attn."),
        ("KimiLinearForCausalLM", "layers.0.self_attn."),
        ("Qwen3NextForCausalLM", ".linear_attn."),
        ("Qwen3_5ForCausalLM", ".linear_attn."),
        ("MiniMaxForCausalLM", "layers.1.self_attn."),
        ("RwkvForCausalLM", "blocks.0.attention."),
        ("RecurrentGemmaForCausalLM", "layers.0.temporal_block."),
    ],
)
def test_mixers_of_linear_attention_are_alike_whatever_they_are_called(architecture, part):
    assert blocks_of(build(architecture), part) - {"norm"} == {"ssm"}


@pytest.mark.parametrize("value", ["a string", ["a", "list"], 3, {}])
def test_a_config_that_is_none(value):
    model = build("LlamaForCausalLM", **SMALL)
    wanted = map_blocks(model).fingerprint()
    model.model.layers[0].mlp.config = value
    assert map_blocks(model).fingerprint() == wanted


def test_attention_of_torch():
    """in_proj_weight is all q, all k, all v; widths that differ have a weight each."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 3, 64), 1)
    layout = map_blocks(encoder)["layers.0.self_attn.in_proj_weight"]
    assert [(p.block.value, p.size, p.unit) for p in layout.pieces] == [("qk", 48, 16), ("qk", 48, 16), ("vo", 48, 1)]
    assert blocks_of(encoder, "linear") == {"ffn"} and blocks_of(encoder, "norm") == {"norm"}
    assert blocks_of(encoder, "out_proj") == {"vo"}
    apart = nn.ModuleDict({"mha": nn.MultiheadAttention(48, 3, kdim=20, vdim=28, add_bias_kv=True)})
    found = {name.removeprefix("mha."): str(p.blocks[0]) for name, p in map_blocks(apart).items() if len(p.blocks) == 1}
    assert found == {
        "q_proj_weight": "qk",
        "k_proj_weight": "qk",
        "v_proj_weight": "vo",
        "bias_k": "qk",
        "bias_v": "vo",
        "out_proj.weight": "vo",
        "out_proj.bias": "vo",
    }


def test_what_is_no_known_module_still_stops():
    model = build("LlamaForCausalLM", **SMALL)
    model.model.layers[0].mystery = nn.Linear(4, 4)
    with pytest.raises(BlockError, match=r"no block rule matches the parameter model.layers.0.mystery.weight"):
        map_blocks(model)
