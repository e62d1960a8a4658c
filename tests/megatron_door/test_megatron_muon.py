"""Muon with block rates in megatron-core: shards and tensor-parallel slices step as one process with torch's Muon does."""

import functools

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron_door.layouts import Layout
from megatron_door.muon import (
    MINI,
    MUON,
    RATIOS,
    bf16_steps,
    built,
    farthest,
    loaded_elsewhere,
    parity,
    saved_and_loaded,
)
from megatron_door.training import prepared
from ranks import pool

from blockwise_lr import BlockError
from blockwise_lr.megatron import BlockSettings

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this PyTorch has no Muon to compare with", allow_module_level=True)

STEPS = 4


@pytest.mark.parametrize(
    "kind, variant, ranks, layout",
    [
        pytest.param(MUON, "gqa", 2, Layout(distributed=True), marks=pytest.mark.full),
        (MUON, "gqa", 2, Layout(tp=2)),
        (MUON, "gqa", 4, Layout(tp=2, distributed=True)),
        (MUON, "gqa", 4, Layout(tp=2, pp=2)),
        pytest.param(MUON, "gqa", 4, Layout(pp=2, vpp=2, distributed=True, layers=4), marks=pytest.mark.full),
        (MUON, "moe", 4, Layout(tp=2, ep=2, sp=True, distributed=True)),
        (MUON, "deepseek", 4, Layout(tp=2, sp=True, distributed=True)),
        (MINI, "gpt", 2, Layout(tp=2, sp=True)),
        pytest.param(MINI, "gqa", 4, Layout(tp=2, distributed=True), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_equals_the_single_process_twin(kind, variant, ranks, layout, record_property):
    prepared(variant, kind, STEPS, layers=layout.layers)
    for result in pool(ranks).run(parity, variant, kind, layout, STEPS):
        record_property("worst", result["worst"])
        assert result["worst"] < 0.1, result
        assert result["apart"] == 0.0


@pytest.mark.parametrize(
    "kind, variant, ranks, layout",
    [
        (MUON, "llama", 4, Layout(bf16=True, tp=2, distributed=True)),
        (MUON, "shared_group", 2, Layout(bf16=True, tp=2)),  # whose ranks hold other parts of q, k and v each
        (MINI, "llama", 2, Layout(bf16=True, tp=2)),
    ],
    ids=str,
)
def test_steps_equal_torchs_on_the_same_gradients(kind, variant, ranks, layout):
    """The sharp one: end to end, what is rounding noise in a matrix's gradient comes to full size in its step. Slices bring
    a matrix's rows in another order, in which sums may round to another bfloat16: not on a Xeon, by 5e-5 on an EPYC."""
    for result in pool(ranks).run(bf16_steps, variant, kind, layout, STEPS):
        assert result["worst"] < 5e-4 and result["apart"] == 0.0, result


@pytest.mark.parametrize(
    "kind, ranks, layout, form, new_ranks, elsewhere",
    [
        (MUON, 4, Layout(tp=2, distributed=True), "fully_reshardable", 2, Layout(distributed=True)),
        (MUON, 2, Layout(bf16=True, distributed=True), "dp_reshardable", 0, None),
        (MINI, 2, Layout(tp=2), "fully_reshardable", 1, Layout()),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_to_the_bit_and_elsewhere(kind, ranks, layout, form, new_ranks, elsewhere, tmp_path):
    for result in pool(ranks).run(saved_and_loaded, kind, "gqa", layout, form, str(tmp_path)):
        wanted, found = result["wanted"], result["found"]
        assert "error" not in found, found
        assert all(torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items())
        assert found["rates"] == wanted["rates"] and found["apart"] == 0
    for found in (
        pool(new_ranks).run(loaded_elsewhere, kind, "gqa", elsewhere, form, str(tmp_path)) if elsewhere else ()
    ):
        assert "error" not in found, found
        zeros = {name: torch.zeros_like(value) for name, value in found["weights"].items()}
        assert farthest(found["weights"], wanted["weights"], zeros)["worst"] < 0.02


def test_megatron_layers_inside_deepspeed():
    """TP=2 through an mpu, ZeRO over the other two ranks, so that ranks hold parts of slices."""
    pytest.importorskip("deepspeed")
    from megatron_door.inside_deepspeed import TOTAL, tensor_parallel

    prepared("llama", MUON, TOTAL, schedule="paper")
    for result in pool(4).run(functools.partial(tensor_parallel, **RATIOS), "llama", MUON, 2):
        assert result["worst"] < 0.1 and result["apart"] == 0.0, result  # slices on their own: 0.25


@pytest.mark.parametrize(
    "ranks, layout, kind, variant, options, config, words",
    [
        (1, Layout(), MUON, "gqa", {}, {"muon_momentum": 0.8}, "--muon-momentum is 0.8, and blockwise_muon takes"),
        (1, Layout(), "BlockwiseAdamW", "gqa", {"block_muon": {"ns_steps": 4}}, {}, "block_muon (--block-muon) is for"),
    ],
    ids=str,
)
def test_what_is_refused(ranks, layout, kind, variant, options, config, words):
    for error in pool(ranks).run(built, layout, kind, variant, options, config, errors=True):
        assert words in str(error)


@pytest.mark.parametrize(
    "given, words",
    [({"beta": 1}, "block_muon has no 'beta'"), ({"momentum": 1}, "below 1"), ([1], "give some of momentum")],
)
def test_bad_options(given, words):
    with pytest.raises(BlockError, match=words):
        BlockSettings(block_muon=given)
