"""Figures per block type, beside sums over whole parameters, in one process and under ZeRO."""

import math

import pytest
import torch.distributed as dist
from deepspeed_door.engines import config, start, train
from ranks import pool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from twins import make, token_ids

from blockwise_lr import BlockError, BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, map_blocks
from blockwise_lr.measure import LossRatio, block_metrics


def block_of(name):
    """Of a Llama's parameter."""
    for part, block in {
        "embed": "embedding",
        "lm_head": "head",
        "norm": "norm",
        "q_proj": "qk",
        "k_proj": "qk",
        "v_proj": "vo",
        "o_proj": "vo",
    }.items():
        if part in name:
            return block
    return "ffn"


def expected(named):
    """Figures of (name, weight, gradient, second moment), whole; None for what there is none of."""
    found = {}
    for name, weight, gradient, moment in named:
        block = block_of(name)
        sums = found.setdefault(block, [0, 0.0, 0.0, 0.0, 0.0])
        sums[0] += weight.numel()
        sums[1] += float(weight.double().square().sum())
        sums[2] += 0 if gradient is None else float(gradient.double().square().sum())
        sums[3] += 0 if moment is None else float(moment.double().sum())
        sums[4] = max(sums[4], 0 if moment is None else float(moment.max()))
    figures = {}
    for block, (numel, weights, gradients, total, largest) in found.items():
        figures[f"weight_rms/{block}"] = math.sqrt(weights / numel)
        if named[0][2] is not None:
            figures[f"gradient_norm/{block}"] = math.sqrt(gradients)
        if named[0][3] is not None:
            figures[f"variance_l1/{block}"], figures[f"variance_max/{block}"] = total, largest
    return figures


@pytest.mark.parametrize("kind", [BlockwiseAdamW, BlockwiseAdamMini, BlockwiseLion])
def test_figures_are_sums_over_the_parameters(kind):
    model = make("llama")
    optimizer = kind(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
    for batch in token_ids(2, 1, 1):
        ids = batch[0][0]
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    named = []
    for name, p in model.named_parameters():
        moment = optimizer.state[p].get("exp_avg_sq")
        if kind is BlockwiseAdamMini:
            from blockwise_lr.checkpoint.moments import expand_segments

            moment = expand_segments(moment, optimizer.plan_of(p))
        named.append((name, p.detach(), p.grad, moment))
    assert block_metrics(optimizer) == pytest.approx(expected(named), rel=1e-6)


def under_zero(stage):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from blockwise_lr.deepspeed import optimizer_of

    engine = start(make("llama"), config("BlockwiseAdamW", stage))
    train(engine, 2)
    named = [
        (name, safe_get_full_fp32_param(p).clone(), None, safe_get_full_optimizer_state(p, "exp_avg_sq").clone())
        for name, p in engine.module.named_parameters()
    ]
    ours, theirs = block_metrics(optimizer_of(engine)), expected(named)
    engine.destroy()
    return ours, theirs


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_are_added_up_and_every_element_counts_once(stage):
    (ours, theirs), second = pool(2).run(under_zero, stage)
    ours = {name: value for name, value in ours.items() if not name.startswith("gradient_norm")}
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert {name: second[0][name] for name in ours} == ours


def under_fsdp(kind):
    model = make(kind)
    whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
    ids = token_ids(1, 1, dist.get_world_size())[0][0][dist.get_rank()]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    named = [
        (name, p.full_tensor().detach(), p.grad.full_tensor(), optimizer.state[p]["exp_avg_sq"].full_tensor())
        for name, p in model.named_parameters()
    ]
    assert {name: tuple(weight.shape) for name, weight, _, _ in named} == whole
    return block_metrics(optimizer), expected(named)


@pytest.mark.parametrize("ranks", [2, 3])
def test_of_fsdp2_they_are_sums_over_whole_parameters(ranks):
    for ours, theirs in pool(ranks).run(under_fsdp, "llama"):
        assert ours == pytest.approx(theirs, rel=1e-5)


def in_a_pipeline():
    from deepspeed_door.test_pipeline import engine_of

    from blockwise_lr.deepspeed import optimizer_of

    block_metrics(optimizer_of(engine_of("BlockwiseAdamW", 1)))


def test_pipelines_are_refused():
    errors = pool(4).run(in_a_pipeline, errors=True)
    assert all(isinstance(error, BlockError) and "pipeline stages hold parts" in str(error) for error in errors)


def test_loss_ratio():
    seen = LossRatio()
    assert [seen.add(loss) for loss in (4.0, 2.0, 2.2, 3.0, float("nan"), 1.0)] == [1, 0.5, 1.1, 1.5, math.inf, 0.5]
    assert (seen.steps, seen.spikes, seen.largest, seen.lowest) == (6, 2, math.inf, 1.0) and seen.share == 2 / 6
    again = LossRatio()
    again.load_state_dict(seen.state_dict())
    assert again.add(1.3) == seen.add(1.3) == 1.3 and again.spikes == 3
