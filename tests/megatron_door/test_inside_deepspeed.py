"""Megatron models handed to DeepSpeed, configured by the ds_config alone, train as one process does."""

# Without q and k norms: under tensor parallelism their gradients are partial, and it is Megatron's own training loop that
# adds them up (finalize_model_grads), which DeepSpeed's engine does not call, whatever the optimizer.
import functools

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")

from kinds import KINDS
from megatron_door.inside_deepspeed import DEEP, TOTAL, pipeline, slice_blocks, tensor_parallel
from megatron_door.training import prepared
from ranks import pool


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2])
def test_tensor_parallel_model_with_zero(kind, stage, record_property):
    prepared("llama", kind, TOTAL, schedule="paper")
    for result in pool(4).run(tensor_parallel, "llama", kind, stage):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0


def test_one_moment_per_bias_vector_over_all_slices(record_property):
    """A column-parallel layer's bias is sliced, and Adam-mini's one moment is that of all slices."""
    prepared("gpt", "BlockwiseAdamMini", TOTAL, schedule="paper", vector_biases=True)
    for result in pool(4).run(
        functools.partial(tensor_parallel, bias_segments="vector"), "gpt", "BlockwiseAdamMini", 1
    ):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_module_of_megatron_layers_with_zero(kind, record_property):
    """No shard's edge lies in the tied embedding here."""
    prepared("llama", kind, TOTAL, schedule="paper", layers=DEEP.layers)
    for result in pool(4).run(pipeline, "llama", kind, 1):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0, result


@pytest.mark.parametrize("kind, kernel", [*((kind, "auto") for kind in KINDS), ("BlockwiseAdamMini", "reference")])
def test_tied_embedding_whose_row_is_cut_on_one_stage_only(kind, kernel, record_property):
    """The row's squares are added up in the same order on both stages, so its copies stay equal to the bit."""
    prepared("many_words", kind, TOTAL, schedule="paper", layers=DEEP.layers)
    for result in pool(4).run(pipeline, "many_words", kind, 1, kernel):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0, result
        if kind == "BlockwiseAdamMini":
            assert sorted(result["edges"]) == [0, 16]  # one stage's shards meet within a row, the other's between rows


def test_slices_of_latent_attention_have_the_blocks_of_megatrons_door():
    """16 rows of the latent and 4 of the rotary key over two ranks: which rows a slice holds depends on the rank."""
    ranks = pool(2).run(slice_blocks, "deepseek")
    for inside, door in ranks:
        assert inside == door
    name = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    assert [inside[name] for inside, _ in ranks] == [[("vo", 10)], [("vo", 6), ("qk", 4)]]
