"""Rules that give rates of their own, through Megatron: as torch's AdamW with a group for each rate, under TP and PP."""

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron_door.checkpoints import Job, loading, saving
from megatron_door.layouts import Layout, megatron
from megatron_door.training import BATCH, BETAS, CLIP, DECAY, EPS, batches, megatron_lr, start_model, trained, worst
from megatron_door.twin import BLOCK_RATIOS, MegatronTwin
from own_rates import RULES, rate_of, rated
from ranks import pool
from references import once
from twins import REFERENCES, worst_difference

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
SETTINGS = {"block_rules": RULES}


@once
def reference(variant, kind, steps):
    """(weights at the start, weights of the unfused twin after the steps) in one process."""
    with megatron(Layout()):
        twin = MegatronTwin(start_model(variant))
        first = {name: value.detach().clone() for name, value in twin.values().items()}
        optimizer = REFERENCES[kind](twin, BETAS, EPS, DECAY, rated(twin.leaves, BLOCK_RATIOS))
        for number, batch in enumerate(batches(steps)):
            for ids in batch.split(1):
                twin.backward(ids, 1 / BATCH)
            twin.clip(CLIP)
            optimizer.step(lambda rate: rate_of(lambda ratio: megatron_lr(number, ratio), rate))
        return first, {name: value.detach().clone() for name, value in twin.values().items()}


def computed(*arguments):
    reference(*arguments)


def parity(variant, kind, layout, steps):
    first, wanted = reference(variant, kind, steps)
    found, apart = trained(variant, kind, layout, steps, first, **SETTINGS)
    return {**worst(found, wanted, kind), "apart": apart}


@pytest.mark.parametrize(
    "kind, variant, layout",
    [(ADAMW, "llama", Layout(tp=2)), (MINI, "llama", Layout(tp=2)), (ADAMW, "llama", Layout(pp=2))],
    ids=str,
)
def test_equals_the_single_process_twin(kind, variant, layout):
    """Under PP the tied embedding is on both stages; its copies are equal to the bit."""
    pool(1).run(computed, variant, kind, 6)
    for result in pool(2).run(parity, variant, kind, layout, 6):
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0


@pytest.mark.parametrize("form, layout", [("fully_reshardable", Layout(tp=2))], ids=str)
def test_a_checkpoint_goes_to_another_layout_and_to_other_rules(form, layout, tmp_path):
    job = Job(MINI, "gqa", layout, form, SETTINGS)
    wanted = pool(2).run(saving, job, str(tmp_path))[0]
    for found in pool(2).run(loading, job, str(tmp_path)):
        assert all(torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items())
        assert found["rates"] == wanted["rates"]
    (found,) = pool(1).run(loading, Job(MINI, "gqa", Layout(), form, SETTINGS), str(tmp_path))
    assert worst_difference(found["weights"], wanted["weights"]) < 1e-5
    other = {"block_rules": [RULES[0], {"match": "*", "layer_decay": 0.9}]}
    (found,) = pool(1).run(loading, Job(MINI, "gqa", Layout(), form, other), str(tmp_path))
    assert "block_lr_ratios: by block_rules, " in found["error"] and "ffn x 0.25 -> ffn x 0.81" in found["error"]
    accepting = {**other, "accept_mismatch": ["block_lr_ratios"]}
    (found,) = pool(1).run(loading, Job(MINI, "gqa", Layout(), form, accepting), str(tmp_path))
    assert "error" not in found
