"""Where norms are, by structure, and what the gradients at initialization say (arXiv 2002.04745)."""

import json

import pytest
import torch
import transformers
from measure import plain_transformers
from typer.testing import CliRunner

from blockwise_lr import BlockError, map_blocks
from blockwise_lr.cli import app
from blockwise_lr.diagnosis import builders_of, diagnose_model, with_depth
from blockwise_lr.measure.placement import placement_of, placements

TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=61,
    max_position_embeddings=32,
)
GQA = {**TINY, "head_dim": 8, "num_key_value_heads": 2}
IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
GPT = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=64, **IDS)
OPT = dict(
    hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, max_position_embeddings=64
)

# family -> its config, the placement, QK norm, and what residuals are scaled with
MODELS = {
    "gpt2": (GPT, "pre-LN", False, 1.0),
    "llama": (TINY, "pre-LN", False, 1.0),
    "gemma2": (GQA, "sandwich", False, 1.0),
    "glm4": (GQA, "sandwich", False, 1.0),
    "olmo2": (TINY, "reordered", True, 1.0),
    "bert": (TINY, "post-LN", False, 1.0),
    "opt": ({**OPT, "word_embed_proj_dim": 32}, "pre-LN", False, 1.0),
    "opt 350M": ({**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, "post-LN", False, 1.0),
    "gptj": ({**GPT, "rotary_dim": 4}, "pre-LN", False, 1.0),  # one norm, attention and FFN side by side
    "gpt_neox": (TINY, "pre-LN", False, 1.0),  # side by side, two norms
    "qwen3": (GQA, "pre-LN", True, 1.0),
    "granite": ({**TINY, "residual_multiplier": 0.25}, "pre-LN", False, 4.0),
}


def built(family):
    values = {**IDS, **MODELS[family][0]}
    config = transformers.AutoConfig.for_model(family.split()[0], **values)
    kind = (
        transformers.BertForMaskedLM
        if family == "bert"
        else transformers.AutoModelForCausalLM._model_mapping[type(config)]
    )
    return lambda layers=2: kind(with_depth(config, layers))


@pytest.mark.parametrize("family", MODELS)
def test_families_are_told_by_what_they_run(family):
    _, placement, qk_norm, residual = MODELS[family]
    torch.manual_seed(0)
    model = built(family)().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1) if p.dim() > 1 else p.normal_(1, 0.1)
    found = placements(model, map_blocks(model), torch.arange(18).view(2, 9))
    assert len(found) == 4 and {one.placement for one in found} == {placement}
    assert {one.qk_norm for one in found if one.kind == "attention"} == {qk_norm}
    assert [one.residual for one in found] == pytest.approx([residual] * 4, rel=1e-3)


PLAIN = {
    "pre": "pre-LN",
    "post": "post-LN",
    "sandwich": "sandwich",
    "reordered": "reordered",
    "deepnorm": "DeepNorm",
    "none": "none",
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_modules_are_told_too(kind):
    model = getattr(plain_transformers, kind)(3).eval()
    found = placements(model, map_blocks(model), torch.arange(18).view(2, 9))
    assert len(found) == 6 and placement_of(found) == PLAIN[kind] and len({one.placement for one in found}) == 1
    assert all(one.qk_norm == (kind in ("sandwich", "reordered")) for one in found if one.kind == "attention")
    if kind == "deepnorm":
        assert found[-1].residual == pytest.approx(6**0.25, rel=1e-3)


def growth(kind, **options):
    def build(layers):
        return lambda: getattr(plain_transformers, kind)(layers, **options)

    return diagnose_model([build(4), build(8)], seeds=3)


def test_behind_the_additions_gradients_do_not_fall_with_depth_and_before_they_do():
    post, pre = growth("post"), growth("pre")
    assert 0.8 < post.growth < 1.3 and post.needs_warmup and "does not fall with depth" in post.why
    assert 0.4 < pre.growth < 0.8 and pre.needs_warmup is False and "falls as 1 / sqrt(depth)" in pre.why
    assert post.layers == (4, 8) and [len(norms) for norms in post.gradients] == [4, 8]


def test_an_initialization_that_shrinks_with_depth_hides_the_difference_and_structure_tells_it():
    found = diagnose_model([lambda: built("gpt2")(4), lambda: built("gpt2")(8)], seeds=3)
    assert found.growth > 0.8 and found.placement == "pre-LN" and "does not tell them apart" in found.why


def test_layers_that_dominate_are_named():
    found = growth("uneven")
    assert (
        found.unevenness > 10
        and "some dominate the first steps" in found.why
        and found.placement == "reordered"
        and found.needs_warmup is None
    )


def run(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


def test_the_command(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY, "num_hidden_layers": 32}))
    result = run(tmp_path, "--layers", 2, "--seeds", 1, "--json", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["placement"] == "pre-LN" and found["layers"] == [2, 4] and (tmp_path / "a.png").stat().st_size > 5000
    told = run("measure.plain_transformers:post", "--layers", 2, "--seeds", 1).output
    assert "norms: post-LN" in told and "needs a warmup: norms lie behind the additions" in told
    one = run("measure.plain_transformers:shallow", "--seeds", 1).output
    assert "2 layers:" in one and "4 layers" not in one


@pytest.mark.parametrize(
    "target, words",
    [
        ("measure.plain_transformers:without_layers", "no layer with an attention or a feed-forward network ran"),
        ("measure.plain_transformers:without_logits", "the model returns no logits of shape"),
        ("nothing", "is no file, no folder"),
    ],
)
def test_what_cannot_be_diagnosed(target, words):
    result = run(target)
    assert result.exit_code == 2 and words in result.output


def test_a_config_that_is_too_large_is_refused_before_it_is_built(tmp_path):
    large = {**TINY, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **large}))
    with pytest.raises(BlockError, match="12 layers of this config have .*B parameters, too many"):
        builders_of(str(tmp_path), 6)
