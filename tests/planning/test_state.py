"""Predicted bytes against what real DeepSpeed engines hold on every rank."""

import json

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train
from ranks import pool
from twins import make

from blockwise_lr.blocks import BlockError, map_blocks
from blockwise_lr.planning import allocate, state_bytes
from blockwise_lr.planning.recipe import ds_config, recipe
from blockwise_lr.planning.state import largest_state_bytes

NAMES = {"BlockwiseAdamW": "adamw", "BlockwiseAdamMini": "adam_mini", "BlockwiseLion": "lion"}
MUONS = {"BlockwiseMuon": "muon", "BlockwiseMuonMini": "muon_mini"}


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def held(kind, stage, dtype):
    """Bytes of this rank after a step: parameters, masters, moments."""
    engine = start(make("llama"), config(kind, stage, dtype=dtype))
    train(engine, 1)
    optimizer = engine.basic_optimizer
    masters = sum(size_of(flat) for flat, _ in optimizer.shards.flats) if optimizer.shards else 0
    moments = sum(size_of(state[spec.name]) for state in optimizer.state.values() for spec in optimizer.rule.states)
    parameters = sum(size_of(getattr(p, "ds_tensor", p)) for p in engine.module.parameters())
    engine.destroy()
    return parameters, masters, moments, dist.get_rank()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_real_engine_holds_what_was_predicted(dtype, kind, stage):
    holds_what_was_predicted(dtype, kind, stage, NAMES[kind])


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("kind", MUONS)
def test_muons_too(kind, stage, dtype):
    holds_what_was_predicted(dtype, kind, stage, MUONS[kind])


def holds_what_was_predicted(dtype, kind, stage, rule):
    block_map = map_blocks(make("llama"))
    for parameters, masters, moments, rank in pool(2).run(held, kind, stage, dtype):
        found = state_bytes(block_map, stage=stage, ranks=2, rank=rank, optimizer=rule, precision=dtype)
        assert (found.parameters, found.masters, found.moments) == (parameters, masters, moments)


def recommended(text):
    """Trains two updates by a written ds_config; its steps, rates and micro-batches."""
    settings = json.loads(text)
    engine = start(make("llama"), settings)
    losses = train(engine, 2)
    rates = engine.basic_optimizer.initial_settings[0]["lr"], engine.lr_scheduler.total_num_steps
    accumulation = engine.gradient_accumulation_steps()
    engine.destroy()
    return rates, accumulation, losses


def test_the_ds_config_that_a_plan_writes_starts_a_run():
    made = recipe(allocate(parameters=1e5, tokens=2e6), length=12, batch=12 * 8, ranks=2)
    for rates, accumulation, losses in pool(2).run(recommended, ds_config(made, micro_batch=2, stage=1)):
        assert rates == (pytest.approx(made.adamw_lr, rel=1e-2), made.steps) and accumulation == 2
        assert all(torch.isfinite(torch.tensor(losses)))
    with pytest.raises(BlockError, match="no learning rate for lion"):
        ds_config(made, optimizer="lion")


def test_adam_mini_halves_the_moments_and_the_fullest_rank_is_found():
    block_map = map_blocks(make("llama"))
    full = [state_bytes(block_map, stage=3, ranks=5, rank=rank, optimizer="adam_mini") for rank in range(5)]
    assert largest_state_bytes(block_map, stage=3, ranks=5, optimizer="adam_mini").total == max(s.total for s in full)
    adamw, mini = (state_bytes(block_map, stage=0, ranks=1, optimizer=of) for of in ("adamw", "adam_mini"))
    numel = sum(layout.numel for layout in block_map.values())
    assert adamw.moments == 8 * numel and 4 * numel < mini.moments < 4.2 * numel


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stage": 4}, "stage is 4"),
        ({"ranks": 0}, "rank 0 of 0"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"optimizer": "sgd"}, "the optimizer is 'sgd'"),
        ({"precision": "fp8"}, "the precision is 'fp8'"),
    ],
)
def test_values_out_of_range_are_refused(given, said):
    with pytest.raises(BlockError, match=said):
        state_bytes(map_blocks(make("llama")), **{"stage": 1, "ranks": 2, **given})
