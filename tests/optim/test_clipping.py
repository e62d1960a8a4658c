"""Clipping by block type against torch's own on the unfused twin's leaves."""

import collections
import copy

import numpy as np
import pytest
import torch
from optim.block_clip import LIMITS, PERCENTILES, in_deepspeed, in_fsdp, in_stages
from ranks import pool
from twins import RATIOS, Twin, clip_blocks, make

from blockwise_lr import BlockError, BlockwiseAdamMini, BlockwiseAdamW, map_blocks

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"


@pytest.mark.parametrize("model_kind", ["llama", "gpt2", "gpt_neox"])
def test_gradients_of_fused_weights_are_clipped_as_torch_clips_their_parts(model_kind):
    model, twin = make(model_kind), Twin(model_kind, make(model_kind))
    ids = torch.arange(24).view(2, 12) % 61
    model(ids, labels=ids).loss.backward()
    twin.backward(ids, 1.0)
    ours = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), block_clip=LIMITS)
    clip_blocks(twin, LIMITS)
    ours.step()  # clips what the parameters hold
    for leaf in twin.leaves.values():  # their gradients, fused as their values are
        leaf.tensor.data = leaf.tensor.grad
    wanted = twin.values()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].detach(), rtol=1e-5, atol=1e-9)


def test_a_number_is_every_block_types_limit_and_small_gradients_stay():
    model = make("llama")
    ours = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), block_clip=1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    kept = model.model.norm.weight.grad.clone()
    ours.step()
    assert set(ours.block_clip.values()) == {1.0} and {*RATIOS} <= {*ours.block_clip}
    assert torch.equal(model.model.norm.weight.grad, kept)


def test_a_bad_gradient_spoils_its_own_block_type_alone():
    model = make("llama")
    ours = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), block_clip=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.model.norm.weight.grad[0] = torch.inf
    ours.step()
    assert model.model.norm.weight.isnan().tolist() == [True] + [False] * 31
    assert model.lm_head.weight.isfinite().all() and model.model.layers[0].mlp.up_proj.weight.isfinite().all()


@pytest.mark.parametrize("model_kind", ["llama", "gpt2"])
def test_grad_power_comes_after_clipping(model_kind):
    model, plain = make(model_kind), make(model_kind)
    options = dict(lr=1e-3, kernel="reference", block_lr_ratios="uniform", weight_decay=0.0, grad_power=1.2)
    ours = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), block_clip={"norm": 0.1}, **options)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    norms = [p for name, p in plain.named_parameters() if "norm" in name or "ln_" in name]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for p, q in zip(model.parameters(), plain.parameters()):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(norms, 0.1)
        for q in plain.parameters():
            q.grad = q.grad.sign() * q.grad.abs() ** 1.2
        ours.step()
        theirs.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("power", [0, -1.0, "2", True])
def test_bad_powers(power):
    with pytest.raises(BlockError, match="grad_power is"):
        BlockwiseAdamW(make("llama").named_parameters(), grad_power=power)
    with pytest.raises(BlockError, match="grad_power is 1.5, which BlockwiseAdamMini does not offer"):
        BlockwiseAdamMini(make("llama").named_parameters(), grad_power=1.5)


def test_percentiles_follow_the_last_norms_through_saves_and_copies():
    """Against numpy's percentile of the last 1,000; a step without a gradient has no norm, and takes a place."""
    options = dict(lr=1e-3, block_clip={"norm": "30%"}, kernel="reference")
    weight = torch.nn.Parameter(torch.ones(4))
    ours = BlockwiseAdamW([("model.norm.weight", weight)], **options)
    norms, draws = collections.deque(maxlen=1000), np.random.default_rng(0)
    for number in range(1300):
        if number == 700:
            saved = ours.state_dict()
            ours = BlockwiseAdamW([("model.norm.weight", weight)], **options)
            ours.load_state_dict(saved)
        if number == 800:
            ours = copy.deepcopy(ours)
            (weight,) = ours.all_tensors()
        norms.append(draws.lognormal() if number % 10 else np.nan)
        size = np.nan_to_num(norms[-1])
        weight.grad = torch.full_like(weight, size / 2)
        ours.step()
        limit = np.nanpercentile(norms, 30) if number else np.inf
        assert float(weight.grad.norm()) == pytest.approx(size * min(limit / (size + 1e-6), 1), rel=1e-5)


@pytest.mark.parametrize("limits", ["90", "0%", {"ffn": "101%"}, "a%", {"kv": "90%"}])
def test_bad_percentiles(limits):
    with pytest.raises(BlockError, match="block_clip"):
        BlockwiseAdamW(make("llama").named_parameters(), block_clip=limits)


@pytest.mark.parametrize("limits", [{"ffn": 0}, {"ffn": "1"}, {"kv": 1.0}, -1.0])
def test_bad_limits(limits):
    with pytest.raises(BlockError, match="block_clip"):
        BlockwiseAdamW(make("llama").named_parameters(), block_clip=limits)


@pytest.mark.parametrize("ranks, kind", [(1, ADAMW), (2, ADAMW), (3, MINI)])
def test_in_fsdp_norms_are_those_of_all_shards(ranks, kind):
    for apart, norms in pool(ranks).run(in_fsdp, "llama", kind):
        assert apart < 1e-5 and norms < 1e-5


CASES = [
    (ADAMW, "llama", 0, 2, {}, 0.5, LIMITS),
    (ADAMW, "gpt2", 1, 2, {}, 0.0, LIMITS),
    (MINI, "llama", 2, 2, {}, 0.5, LIMITS),
    (ADAMW, "llama", 2, 2, {"offload_optimizer": {"device": "cpu"}}, 0.0, LIMITS),
    (ADAMW, "gpt2", 3, 2, {"sub_group_size": 3000}, 0.5, LIMITS),
    (MINI, "llama", 3, 2, {"sub_group_size": 3000}, 0.0, LIMITS),
    (ADAMW, "gpt2", 2, 2, {}, 0.0, PERCENTILES),
    (MINI, "llama", 3, 2, {"sub_group_size": 3000}, 0.5, PERCENTILES),
]


@pytest.mark.parametrize("kind, model, stage, ranks, zero, global_norm, limits", CASES)
def test_in_deepspeed_it_is_the_twins(kind, model, stage, ranks, zero, global_norm, limits):
    for apart, from_unclipped in pool(ranks).run(in_deepspeed, model, kind, stage, zero, global_norm, limits):
        assert apart < 1e-5 and from_unclipped > 1e-3


def test_pipelines_are_refused_on_every_rank():
    for error in pool(2).run(in_stages, errors=True):
        assert "block_clip needs every block type's gradients over data-parallel ranks alone" in str(error)
