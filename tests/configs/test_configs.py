"""The ready configs: taken by DeepSpeed's own config class and Megatron's own parser, and every parameter mapped."""

import argparse
import json
from pathlib import Path

import pytest

from blockwise_lr.blocks import map_blocks
from blockwise_lr.blocks.types import PAPER_RATIOS
from blockwise_lr.inspection import load_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = sorted(CONFIGS.glob("models/*.json"))
DEEPSPEED = sorted(CONFIGS.glob("deepspeed/*.json"))
MEGATRON = sorted(CONFIGS.glob("megatron/*.args"))
# parameters in units of 1e9, from the name of the file or the model's report
SIZES = {
    "gpt2-124m": 0.124,
    "llama-0.13b": 0.134,
    "llama-0.25b": 0.237,
    "llama-0.5b": 0.522,
    "llama-1.1b": 1.175,
    "llama-2b": 2.05,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "mixtral-8x7b": 46.7,
}
PAPER = {block.value: ratio for block, ratio in PAPER_RATIOS.items()}
LARGE = ("llama-3-8b", "llama-3-70b", "mixtral-8x7b")  # beyond the paper's sizes, at rates published for AdamW


def ratios_of(path):
    """The paper's at its sizes, else those under which most weights keep AdamW's rate."""
    large = path.name.startswith(LARGE)
    return {**dict.fromkeys(PAPER, 1.0), "embedding": 10.0} if large else PAPER


def model_of(path):
    return json.loads((CONFIGS / "models" / (path.name.split(".zero")[0].removesuffix(".args") + ".json")).read_text())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_models_have_the_size_of_their_name_and_are_mapped(path):
    numel = sum(map_blocks(load_model(str(path))).block_numel().values())
    assert numel / 1e9 == pytest.approx(SIZES[path.stem], rel=0.02)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_takes_the_json(path):
    DeepSpeedConfig = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    from blockwise_lr import BlockwiseAdamW
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    settings = json.loads(path.read_text())
    parsed = DeepSpeedConfig(settings)
    assert parsed.bfloat16_config.enabled and parsed.zero_enabled
    assert f"zero{parsed.zero_optimization_stage}" in path.name
    assert (parsed.zero_config.offload_optimizer is not None) == ("offload" in path.name)
    assert parsed.optimizer_name == "BlockwiseAdamW" and parsed.scheduler_name == "BlockwiseWarmupCosine"
    model = load_model(str(CONFIGS / "models" / (path.name.split(".zero")[0] + ".json")))
    params = dict(parsed.optimizer_params, betas=tuple(parsed.optimizer_params["betas"]))
    optimizer = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), **params)
    schedule = BlockwiseWarmupCosine(optimizer, **parsed.scheduler_params)
    assert params["block_lr_ratios"] == ratios_of(path)
    assert schedule.min_lrs == [pytest.approx(params["lr"] / 20)]


VARIANTS = sorted(CONFIGS.glob("variants/*.json"))
FIRST_BASE = 6e-4


def differences(one, other, where=""):
    """The keys in which two nested dicts differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return set() if one == other else {where}
    return {found for key in {*one, *other} for found in differences(one.get(key), other.get(key), f"{where}/{key}")}


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_differs_in_what_it_is_named_for(path):
    DeepSpeedConfig = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    from blockwise_lr.optim import CLASSES
    from blockwise_lr.schedules import SCHEDULES

    settings = json.loads(path.read_text())
    base = json.loads((CONFIGS / "deepspeed" / "llama-0.25b.zero1.json").read_text())
    assert differences(settings, base) <= {
        *("/optimizer/type", "/scheduler/type", "/scheduler/params/meet_lr"),
        *(f"/optimizer/params/{name}" for name in ("lr", "min_lr", "betas", "eps", "weight_decay")),
    }
    parsed = DeepSpeedConfig(settings)
    model = load_model(str(CONFIGS / "models" / "llama-0.25b.json"))
    kind = CLASSES[parsed.optimizer_name]
    optimizer = kind(model.named_parameters(), block_map=map_blocks(model), **parsed.optimizer_params)
    schedule = SCHEDULES[parsed.scheduler_name](optimizer, **parsed.scheduler_params)
    assert schedule.min_lrs == [pytest.approx(parsed.optimizer_params["lr"] / (10 if "wsd" in path.name else 20))]
    words = (CONFIGS / "variants" / f"{path.stem.split('.')[2]}.args").read_text().split()
    value = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    assert value.get("--optimizer", "blockwise_adamw") == f"blockwise_{kind.rule.name}"
    assert float(value.get("--lr", FIRST_BASE)) == parsed.optimizer_params["lr"]
    assert float(value.get("--min-lr", FIRST_BASE / 20)) == pytest.approx(schedule.min_lrs[0])
    if "--block-schedule" in words:
        given = dict(word.split("=") for word in words[words.index("--block-schedule") + 2 :])
        assert given == {name: str(value) for name, value in parsed.scheduler_params.items()}


def flags(path):
    return path.read_text().split()


@pytest.mark.parametrize("path", MEGATRON, ids=lambda path: path.stem)
def test_megatron_files_agree_with_the_other_two(path):
    """Shapes with the model's file, rates with the DeepSpeed file."""
    words, model = flags(path), model_of(path)
    value = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    assert int(value["--hidden-size"]) == model.get("hidden_size", model.get("n_embd"))
    assert int(value["--num-layers"]) == model.get("num_hidden_layers", model.get("n_layer"))
    assert int(value["--num-attention-heads"]) == model.get("num_attention_heads", model.get("n_head"))
    assert int(value.get("--num-query-groups", value["--num-attention-heads"])) == model.get(
        "num_key_value_heads", model.get("n_head")
    )
    settings = json.loads(next(CONFIGS.glob(f"deepspeed/{path.stem}.zero*.json")).read_text())
    optimizer, schedule = settings["optimizer"]["params"], settings["scheduler"]["params"]
    assert float(value["--lr"]) == optimizer["lr"] and float(value["--min-lr"]) == optimizer["min_lr"]
    assert int(value["--train-iters"]) == schedule["total_num_steps"]
    assert int(value["--lr-warmup-iters"]) == schedule["warmup_num_steps"]
    assert int(value["--global-batch-size"]) == settings["train_batch_size"]
    start = words.index("--block-lr-ratios") + 1
    ratios = dict(word.split("=") for word in words[start : start + len(PAPER)])
    assert {block: float(ratio) for block, ratio in ratios.items()} == ratios_of(path)


@pytest.mark.parametrize("path", MEGATRON, ids=lambda path: path.stem)
def test_megatron_takes_the_arguments(path):
    """Megatron's own parser, with our flags in it, knows every flag."""
    arguments = pytest.importorskip("megatron.training.arguments", reason="megatron.training needs Python 3.12")
    from blockwise_lr.megatron.settings import add_arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    if "--block-lr-ratios" not in parser._option_string_actions:  # an applied patch has added them already
        add_arguments(parser)
    parsed = parser.parse_args(flags(path))
    assert parsed.bf16 and parsed.use_distributed_optimizer and parsed.adam_beta2 == 0.95
    assert parsed.blockwise_optimizer == "blockwise_adamw" and dict(parsed.block_lr_ratios) == ratios_of(path)


def test_the_table_of_which_to_pick_names_every_model():
    text = (CONFIGS / "README.md").read_text()
    names = {path.stem for path in MODELS}
    assert names == set(SIZES) == {path.stem for path in MEGATRON}
    assert all(name in text or name.removeprefix("llama-") in text for name in names)
