"""Every option, wherever it comes from, passes the same checks; errors name the option, its value and the fix."""

import numpy as np
import pytest
import torch
from twins import make

from blockwise_lr import BlockError, BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, map_blocks
from blockwise_lr.rules.adam_mini import AdamMiniOptions
from blockwise_lr.rules.adamw import AdamWOptions
from blockwise_lr.transformers import BlockwiseAdamWFactory, BlockwiseLionFactory

BAD = [
    ("lr", -1, "lr is -1; give a finite number, 0 or above"),
    ("lr", "1e-4", "lr is '1e-4'; this is text"),
    ("lr", float("nan"), "lr is nan"),
    ("lr", True, "lr is True; give a finite number"),
    ("lr", 10**400, "lr is 1000000"),
    ("lr", None, "lr is None"),
    ("lr", [1e-3], "lr is"),
    ("lr", torch.ones(2), "lr is"),
    ("eps", -1, "eps is -1"),
    ("eps", "1e-8", "eps is '1e-8'"),
    ("weight_decay", -5, "weight_decay is -5"),
    ("weight_decay", float("inf"), "weight_decay is inf"),
    ("betas", 0.9, "betas are 0.9; give two numbers"),
    ("betas", None, "betas are None"),
    ("betas", (0.9, 1.5), "betas are"),
    ("betas", [0.9], "betas are"),
    ("betas", ["0.9", 0.95], "betas are"),
    ("betas", (True, 0.9), "betas are"),
    ("betas", "99", "betas are '99'"),
    ("block_lr_ratios", {"norm": -3}, r"block_lr_ratios\['norm'\] is -3"),
    ("block_lr_ratios", {"qk": 0}, "above 0"),
    ("block_lr_ratios", {"qk": "8"}, r"block_lr_ratios\['qk'\] is '8'"),
    ("block_lr_ratios", {"qkv": 1.0}, "unknown block type 'qkv'"),
    ("block_lr_ratios", [8.0], "must map block types"),
    (
        "block_lr_ratios",
        "papers",
        "names the preset 'papers' .did you mean 'paper'..; use one of paper, uniform, embedding",
    ),
    ("block_lr_ratios", {"preset": 3}, "names the preset 3"),
    ("block_lr_ratios", {"preset": "uniform", "qk": 0}, "above 0"),
    ("adamw_lr", -1, "adamw_lr is -1; give a finite number, 0 or above"),
    ("adamw_lr", "3e-3", "adamw_lr is '3e-3'; this is text"),
    ("lr", "from_adamw", "adamw_lr is not given; add adamw_lr"),
    ("block_weight_decay", {"norm": float("nan")}, r"block_weight_decay\['norm'\]"),
    ("block_weight_decay", {"qk": 10**400}, r"block_weight_decay\['qk'\]"),
    ("decay_norms_and_biases", "false", "decay_norms_and_biases is 'false'; write true or false, without quotes"),
    ("decay_norms_and_biases", 1, "decay_norms_and_biases is 1"),
    ("decay_norms_and_biases", None, "decay_norms_and_biases is None"),
    ("min_lr", -1e-5, "min_lr is -1e-05"),
    ("min_lr", "0", "min_lr is '0'"),
    ("min_lr", 1.0, "min_lr is 1.0 and lr is 0.001; give a min_lr from 0 up to lr"),
    ("kernel", "cuda", "kernel is 'cuda'; use one of auto"),
    ("kernel", None, "kernel is None"),
    ("accept_mismatch", ["lrs"], "accept_mismatch names 'lrs'"),
    ("accept_mismatch", 3, "accept_mismatch is 3"),
    ("ratio_fade_steps", -1, "ratio_fade_steps is -1"),
    ("ratio_fade_steps", 1.5, "ratio_fade_steps is 1.5"),
    ("ratio_fade_steps", True, "ratio_fade_steps is True"),
    ("block_rules", {"match": "*"}, "give a list of rules"),
    ("block_rules", "*.adapter.*", "give a list of rules"),
]
IN_GROUPS = [bad for bad in BAD if bad[0] in AdamWOptions.group_names()]


@pytest.mark.parametrize("name, value, words", BAD)
def test_bad_values_in_python(name, value, words):
    model = make("llama")
    for cls in (BlockwiseAdamW, BlockwiseAdamMini):
        with pytest.raises(BlockError, match=words):
            cls(model.named_parameters(), block_map=map_blocks(model), **{name: value})
    with pytest.raises(BlockError, match=words):
        BlockwiseAdamWFactory()(model, **({} if name == "adamw_lr" else {"lr": 1e-3}) | {name: value})


def test_a_factory_needs_its_own_learning_rate():
    """The Trainer does not tell it learning_rate; the default would silently take its place."""
    model = make("llama")
    with pytest.raises(BlockError, match="BlockwiseAdamWFactory needs its own learning rate.*adamw_lr"):
        BlockwiseAdamWFactory()(model, weight_decay=0.1)
    with pytest.raises(BlockError, match="BlockwiseLionFactory needs its own learning rate") as told:
        BlockwiseLionFactory()(model)
    assert "adamw_lr" not in str(told.value)
    assert BlockwiseAdamWFactory()(model, adamw_lr=6e-4, block_lr_ratios="paper").param_groups[0][
        "lr"
    ] == pytest.approx(1e-4)
    assert BlockwiseAdamWFactory()(model, adamw_lr=6e-4).param_groups[0]["lr"] == 6e-4


@pytest.mark.parametrize("name, value, words", IN_GROUPS)
def test_bad_values_in_param_groups(name, value, words):
    model = make("llama")
    named = list(model.named_parameters())
    with pytest.raises(BlockError, match=f"param group 1: .*{words}|param group 1: {words}"):
        BlockwiseAdamW([{"params": named[:3]}, {"params": named[3:], name: value}], block_map=map_blocks(model))


def test_a_number_that_python_does_not_print():
    with pytest.raises(BlockError, match="lr is a int too long to be shown; give a finite number"):
        AdamWOptions.checked({"lr": 10**5000})


def test_unknown_options_name_the_nearest():
    with pytest.raises(
        BlockError, match="optimizer X: unknown parameter 'block_lr_ratio' .did you mean 'block_lr_ratios'"
    ):
        AdamWOptions.checked({"block_lr_ratio": {}}, "optimizer X: ")
    with pytest.raises(BlockError, match="unknown parameter 'bias_segments'.*valid ones are lr, betas"):
        AdamWOptions.checked({"bias_segments": "vector"})
    with pytest.raises(BlockError, match="bias_segments is 'row'; use one of element, vector"):
        AdamMiniOptions.checked({"bias_segments": "row"})


def test_good_values_of_all_kinds():
    model = make("llama")
    optimizer = BlockwiseAdamW(
        model.named_parameters(),
        lr=np.float32(0.5),
        betas=[0, np.float64(0.5)],
        eps=0,
        weight_decay=1,
        min_lr=0,
        block_lr_ratios={"qk": 2},
        block_map=map_blocks(model),
    )
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.5 and type(group["lr"]) is float and group["betas"] == (0.0, 0.5)
    assert group["block_lr_ratios"]["qk"] == 2.0 and group["block_lr_ratios"]["embedding"] == 10.0


def test_partial_ratios_of_a_group_are_filled_up():
    model = make("llama")
    named = list(model.named_parameters())
    optimizer = BlockwiseAdamW(
        [{"params": named[:5]}, {"params": named[5:], "block_lr_ratios": {"qk": 2.0}, "lr": 1e-2}],
        lr=1e-3,
        block_map=map_blocks(model),
    )
    rates = optimizer.block_lrs()
    assert rates[0]["qk"] == pytest.approx(1e-3) and rates[1]["qk"] == pytest.approx(2e-2)
    assert rates[1]["embedding"] == pytest.approx(1e-1)


def rates_of(**options):
    model = make("llama")
    optimizer = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), **options)
    return optimizer.block_lrs()[0]


def test_presets_are_ratios_with_a_name():
    ones = {"embedding": 1e-3, "head": 1e-3, "qk": 1e-3, "vo": 1e-3, "ffn": 1e-3, "norm": 1e-3}
    assert rates_of(block_lr_ratios="uniform") == pytest.approx(ones)
    paper = {"embedding": 1e-2, "head": 1e-2, "qk": 8e-3, "vo": 4e-3, "ffn": 6e-3, "norm": 1e-3}
    assert rates_of(block_lr_ratios="paper") == rates_of(block_lr_ratios={"preset": "paper"}) == pytest.approx(paper)
    assert rates_of(block_lr_ratios="embedding") == pytest.approx({**ones, "embedding": 1e-2, "head": 1e-2})
    assert rates_of(block_lr_ratios="embedding") == rates_of() == rates_of(block_lr_ratios={})
    mixed = rates_of(block_lr_ratios={"preset": "embedding", "head": 2, "norm": 0.5})
    assert mixed == pytest.approx({**ones, "embedding": 1e-2, "head": 2e-3, "norm": 5e-4})


def test_the_base_rate_follows_from_adamws_so_that_the_ffn_trains_at_it():
    paper = rates_of(adamw_lr=3e-3, block_lr_ratios="paper")
    assert paper["ffn"] == pytest.approx(3e-3) and paper["norm"] == pytest.approx(5e-4)
    assert rates_of(lr="from_adamw", adamw_lr=3e-3) == rates_of(adamw_lr=3e-3)
    assert rates_of(adamw_lr=3e-3) == rates_of(lr=3e-3)
    with pytest.raises(
        BlockError, match="adamw_lr is 0.003, and the rates of this optimizer do not follow from AdamW's"
    ):
        BlockwiseLion(make("llama").named_parameters(), adamw_lr=3e-3)
    with pytest.raises(BlockError, match="lr is 0.001 and adamw_lr 0.003; give one of them"):
        rates_of(lr=1e-3, adamw_lr=3e-3)


def test_adamws_rate_as_the_base_rate_is_warned_of(caplog):
    rates_of(lr=1e-3, block_lr_ratios="paper")
    rates_of(lr=3e-2, block_lr_ratios="uniform")
    rates_of(lr=1e-2)
    assert not caplog.records
    rates_of(lr=3e-3, block_lr_ratios="paper")
    assert [record.getMessage() for record in caplog.records] == [
        "BlockwiseAdamW: lr 0.003 trains ffn blocks at 0.018, above what one learning rate "
        "usually is (0.01 at most); if 0.003 is the rate of a run with one rate, give adamw_lr=0.003 in place of lr"
    ]
