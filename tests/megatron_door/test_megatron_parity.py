"""Law 1 on real megatron-core: any layout trains as one process with torch's AdamW per block type does."""

import pytest

pytest.importorskip("megatron.core")

import torch
from kinds import with_kinds
from megatron_door.layouts import Layout
from megatron_door.training import parity, prepared, steps_parity
from ranks import pool

CASES = [
    ("gpt", 1, Layout()),
    ("gpt", 2, Layout()),
    ("gqa", 2, Layout(distributed=True)),
    ("gqa", 2, Layout(distributed=True, overlap=True)),
    ("gqa", 2, Layout(tp=2)),
    ("shared_group", 2, Layout(tp=2)),
    ("gqa", 2, Layout(pp=2)),
    ("gqa", 2, Layout(pp=2, vpp=2, layers=4)),
    ("gqa", 4, Layout(tp=2, pp=2)),
    ("gqa", 4, Layout(tp=2, distributed=True)),
    ("gpt", 4, Layout(pp=2, distributed=True)),
    ("gqa", 4, Layout(pp=2, vpp=2, distributed=True, layers=4)),
    ("gpt", 2, Layout(tp=2, sp=True)),
    ("gqa", 4, Layout(cp=2, distributed=True)),
    ("gqa", 4, Layout(tp=2, cp=2, sp=True)),
    ("moe", 2, Layout(ep=2)),
    ("moe", 4, Layout(ep=2, distributed=True)),
    ("moe", 4, Layout(tp=2, ep=2, sp=True, distributed=True)),
    # gloo gathers equal parts only, which the "alltoall" dispatcher does not always ask for where experts are split
    ("moe", 4, Layout(tp=2, ep=2, etp=2, sp=True, distributed=True, extra=dict(moe_token_dispatcher_type="allgather"))),
    ("moe", 4, Layout(ep=2, instances=2, distributed=True)),
    ("delta", 4, Layout(tp=2, sp=True, distributed=True)),
    ("deepseek", 2, Layout(pp=2)),
    # without sequence parallelism, finalize_model_grads adds up MLA's q_layernorm over TP, which is whole already
    ("deepseek", 4, Layout(tp=2, sp=True, distributed=True)),
]


@pytest.mark.parametrize("kind, variant, ranks, layout", with_kinds(CASES), ids=str)
def test_equals_the_single_process_twin(kind, variant, ranks, layout, record_property):
    prepared(variant, kind, 10, layers=layout.layers)
    for result in pool(ranks).run(parity, variant, kind, layout):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0  # replicas, and the tied embedding's copies, to the bit


BF16 = [
    ("BlockwiseAdamW", 2, Layout(bf16=True, distributed=True)),
    ("BlockwiseAdamW", 2, Layout(bf16=True, tp=2)),
    ("BlockwiseAdamMini", 2, Layout(bf16=True, tp=2)),
    ("BlockwiseAdamMini", 2, Layout(bf16=True, distributed=True)),
]


@pytest.mark.parametrize("kind, ranks, layout", BF16, ids=str)
def test_bf16_steps_equal_the_twins_on_the_same_gradients(kind, ranks, layout, record_property):
    for result in pool(ranks).run(steps_parity, "llama", kind, layout):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-6, result
        assert result["apart"] == 0.0


@pytest.mark.parametrize("kind, ranks, layout", [("adam", 2, Layout(bf16=True, tp=2)), *BF16], ids=str)
def test_bf16_follows_the_twin(kind, ranks, layout, record_property):
    """End to end, against one process in bf16 with fp32 weights: 10 steps change every tensor as there, but for what
    the steps make of roundings to 8 bits in another order. Megatron's own Adam, at one learning rate, is held to the
    same bound. The test above is the sharp one."""
    prepared("llama", kind, 10, torch.bfloat16)
    for result in pool(ranks).run(parity, "llama", kind, layout):
        record_property("worst", result["worst"])
        assert result["worst"] < 0.05, result
        assert result["apart"] == 0.0


def local_rows(layout):
    return parity("llama", "BlockwiseAdamMini", layout, row_parallel_sums=False)


def test_the_local_form_of_adam_mini_depends_on_tensor_parallelism():
    prepared("llama", "BlockwiseAdamMini", 10)
    for result in pool(2).run(local_rows, Layout(tp=2)):
        assert result["worst"] > 1e-4 and ("linear_proj" in result["name"] or "linear_fc2" in result["name"]), result
