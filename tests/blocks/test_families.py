"""Every model family: what is mapped to what, against counts from the config by hand."""

import pytest
import torch
import transformers
from blocks.family_counts import EXPECTED
from typer.testing import CliRunner

from blockwise_lr import map_blocks
from blockwise_lr.cli import app
from blockwise_lr.transformers.public_models import PUBLIC_MODELS, survey


@pytest.mark.parametrize("model", PUBLIC_MODELS, ids=lambda model: model.name)
def test_elements_parameters_and_spans_are_those_of_the_config(model):
    found = survey(model)
    elements, parameters, spans = EXPECTED[model.name](model.config)
    assert found.unmapped == 0
    assert found.block_numel == elements
    assert (found.mapped, found.spans) == (parameters, spans)


def test_the_command_prints_a_row_per_public_model():
    result = CliRunner().invoke(app, ["families"])
    assert result.exit_code == 0, result.output
    for model in PUBLIC_MODELS:
        assert model.name in result.output
    assert set(EXPECTED) == {model.name for model in PUBLIC_MODELS}


@pytest.mark.parametrize(
    "name, transposed",
    [
        ("llama-4-maverick", True),
        ("gpt-oss-20b", True),
        ("mixtral-8x7b", False),
        ("qwen3-30b-a3b", False),
        ("deepseek-v3", False),
        ("jamba-v0.1", False),
        ("granite-3.1-1b-a400m", False),
        ("olmoe-1b-7b", False),
    ],
)
def test_stacked_experts_have_their_outputs_where_the_shape_says(name, transposed):
    """down_proj has the model's width as outputs; its inner size is another number."""
    model = next(model for model in PUBLIC_MODELS if model.name == name)
    hidden = model.config["hidden_size"]
    found = [layout for key, layout in map_blocks(model.build()).items() if key.endswith("experts.down_proj")]
    assert found and all(p.outputs == hidden and p.transposed == transposed and p.batch_dims == 1 for p in found)


def test_what_sets_time_scales_is_not_decayed():
    model = next(model for model in PUBLIC_MODELS if model.name == "mamba-130m")
    block_map = map_blocks(model.build())
    found = {name.rpartition(".")[2]: layout.kind for name, layout in block_map.items() if "mixer" in name}
    assert found["A_log"] == found["D"] == "bias"


def test_a_vision_tower_has_its_own_heads():
    """Gemma 3 with its vision tower: 16 heads in the tower, 4 and 1 in the language model."""
    text = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=100,
    )
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=16, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    block_map = map_blocks(model, strict=False)
    units = {name: block_map[name].pieces[0].unit for name in block_map if name.endswith("q_proj.weight")}
    assert {unit for name, unit in units.items() if "vision" in name} == {32 // 16}
    assert {unit for name, unit in units.items() if "language" in name} == {16}
    assert block_map.unmapped == set()
