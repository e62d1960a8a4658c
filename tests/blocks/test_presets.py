"""Presets of ratios: numbers by hand from their sources, sizes from the model's config, and the same by every door."""

import json

import pytest
from deepspeed_door.engines import config, start
from ranks import pool
from twins import make
from typer.testing import CliRunner

from blockwise_lr import BlockError, BlockwiseAdamW, BlockwiseMuon, map_blocks
from blockwise_lr.blocks import lr_ratios
from blockwise_lr.cli import app

LLAMA = {"hidden_size": 1024, "num_hidden_layers": 16}
GPT = {"n_embd": 1024, "n_layer": 16}
WIDE = {"base_hidden_size": 256}  # 4 times as wide
DEEP = {"base_num_layers": 4}  # 4 times as deep


@pytest.mark.parametrize("of", [LLAMA, GPT])
@pytest.mark.parametrize(
    "values, embedding, head, matrices, norm",
    [
        ({"preset": "mup", **WIDE}, 1, 1 / 4, 1 / 4, 1),
        ({"preset": "completep", **WIDE}, 1, 1, 1 / 4, 1),
        ({"preset": "depth_mup", **WIDE, **DEEP}, 1, 1, 1 / 8, 1 / 2),
        ({"preset": "sqrt_width", **WIDE}, 2, 1, 1, 1),
        ({"preset": "sqrt_width", "base_hidden_size": 1}, 32, 1, 1, 1),
        ("nanochat", 0.2 * (768 / 1024) ** 0.5 / 0.02, 0.004 * (768 / 1024) ** 0.5 / 0.02, 1, 0.5 * 0.01 / 0.02),
        ("modded_nanogpt", 0.008 / 0.023, 0.008 / 0.023, 1, 0.008 / 0.023),
        ({"preset": "mup", **WIDE, "hidden_size": 512, "head": 3}, 1, 3, 1 / 2, 1),
    ],
)
def test_numbers_of_the_sources(of, values, embedding, head, matrices, norm):
    found = {str(block): ratio for block, ratio in lr_ratios(values, config=of).items()}
    wanted = {"embedding": embedding, "head": head, "norm": norm, **dict.fromkeys(("qk", "vo", "ffn"), matrices)}
    assert {block: found[block] for block in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    "values, words",
    [
        ("mup", 'needs base_hidden_size, .* write {"preset": "mup", "base_hidden_size": 256}'),
        ({"preset": "depth_mup", **WIDE}, "needs base_num_layers"),
        ({"preset": "mup", **WIDE}, 'needs the model\'s hidden_size, .* or add "hidden_size" beside the preset'),
        ({"preset": "mup", "base_hidden_size": 0.5}, r"\['base_hidden_size'\] is 0.5; give a whole number"),
        ({"preset": "uniform", **WIDE}, "has base_hidden_size, and the preset uniform takes no size; leave"),
        ({"preset": "nanochat", **WIDE}, "has base_hidden_size, and the preset nanochat takes hidden_size; leave"),
        ({"preset": "mupp", **WIDE}, "names the preset 'mupp' .did you mean 'mup'..; use one of paper, "),
        ("auto", "is 'auto', and ratios cannot be found without data"),
    ],
)
def test_what_is_missing_or_makes_no_sense_is_refused(values, words):
    with pytest.raises(BlockError, match=words):
        lr_ratios(values)


def test_the_size_is_the_models():
    model, ratios = make("llama"), {"preset": "mup", "base_hidden_size": 8}
    optimizer = BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(model), block_lr_ratios=ratios)
    rates = optimizer.block_lrs()[0]
    assert rates == pytest.approx(
        {"embedding": 1e-3, "norm": 1e-3, **dict.fromkeys(("head", "qk", "vo", "ffn"), 2.5e-4)}
    )
    optimizer.set_block_lr_ratios({**ratios, "base_hidden_size": 16})
    assert optimizer.block_lrs()[0]["qk"] == pytest.approx(5e-4)
    group = {"params": list(model.named_parameters()), "block_lr_ratios": ratios}
    one = BlockwiseAdamW([group], lr=1e-3, block_map=map_blocks(model))
    assert one.block_lrs()[0] == pytest.approx(rates)
    followed = BlockwiseAdamW(
        model.named_parameters(), adamw_lr=1e-3, block_map=map_blocks(model), block_lr_ratios=ratios
    )
    assert followed.block_lrs()[0]["ffn"] == pytest.approx(1e-3)
    with pytest.raises(BlockError, match="no config tells it; make the block map from a model with a config"):
        BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_lr_ratios=ratios)


def test_those_of_muon_are_muons():
    model = make("llama")
    given = dict(block_map=map_blocks(model), block_lr_ratios="nanochat")
    rates = BlockwiseMuon(model.named_parameters(), lr=0.02, matrix_scale="original", **given).block_lrs()[0]
    scale = (32 / 768) ** -0.5
    assert rates["qk"] == 0.02 and rates["embedding"] == pytest.approx(0.2 * scale) and rates["norm"] == 0.005
    for kind in (BlockwiseMuon, BlockwiseAdamW):
        with pytest.raises(BlockError, match="use BlockwiseMuon with matrix_scale 'original', or another preset"):
            kind(model.named_parameters(), lr=1e-3, **given)


def by_a_ds_config():
    from blockwise_lr.deepspeed import block_lrs

    ratios = {"preset": "depth_mup", "base_hidden_size": 8, "base_num_layers": 2}
    settings = config("BlockwiseAdamW", 1, optimizer={"lr": 1e-3, "block_lr_ratios": ratios})
    settings.pop("scheduler")
    engine = start(make("llama"), settings)
    rates = block_lrs(engine)
    engine.destroy()
    return rates


def test_in_a_ds_config():
    assert pool(1).run(by_a_ds_config)[0][0]["qk"] == pytest.approx(2.5e-4)


def by_the_trainers_factory():
    from blockwise_lr.transformers import BlockwiseAdamWFactory

    return BlockwiseAdamWFactory()(make("llama"), lr=1e-3, block_lr_ratios={"preset": "mup", "base_hidden_size": 8})


def test_by_the_trainers_factory():
    assert by_the_trainers_factory().block_lrs()[0]["vo"] == pytest.approx(2.5e-4)


def run(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def test_inspect_shows_what_each_gives_this_model(tmp_path):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 99,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    shown = run(tmp_path, "--presets", "--ratio", "base_hidden_size=16")
    assert shown.exit_code == 0 and "mup" in shown.output and "arXiv 2502.19002, tuned by hand" in shown.output
    found = json.loads(run(tmp_path, "--presets", "--ratio", "base_hidden_size=16", "--format", "json").stdout)
    assert found["mup"]["ratios"] == {"embedding": 1, "head": 0.25, "qk": 0.25, "vo": 0.25, "ffn": 0.25, "norm": 1}
    assert found["paper"]["ratios"]["head"] == 10 and "2203.03466" in found["mup"]["source"]
    assert found["nanochat"]["ratios"]["head"] == pytest.approx(0.2 * 12**0.5)
    assert not found["depth_mup"]["ratios"] and "needs base_num_layers" in found["depth_mup"]["missing"]
    one = json.loads(run(tmp_path, "--ratio", "mup", "--ratio", "base_hidden_size=16", "--format", "json").stdout)
    assert {row["ratio"] for row in one["parameters"] if row["block"] == "qk"} == {0.25}
    for words, told in (
        (["--presets", "--format", "svg"], "--presets is printed as a table or as JSON"),
        (["--presets", "--ratio", "qk=0"], "give a finite number above 0"),
        (["--ratio", "mup"], "needs base_hidden_size"),
        (["--ratio", "qk"], "names the preset 'qk'"),
    ):
        bad = run(tmp_path, *words)
        assert bad.exit_code == 2 and told in bad.output
