"""Muon with block rates against torch.optim.Muon on matrices that are taken apart beforehand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from optim.muon import OURS, cut_anywhere, followed
from ranks import pool
from twins import make

from blockwise_lr import BlockError, BlockwiseAdamW, BlockwiseMuon, BlockwiseMuonMini, map_blocks
from blockwise_lr.checkpoint import CheckpointError
from blockwise_lr.optim import ShardBoundaries, ShardMap, matrix_exchange
from blockwise_lr.optim.matrixwise import orthogonalized

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this PyTorch has no Muon to compare with", allow_module_level=True)

# both orthogonalize in bfloat16, whose rounding is what is left; q, k and v orthogonalized together are more than 1 apart
CLOSE = 0.06


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_it_is_torchs_on_the_parts_of_fused_weights(model, scale):
    apart = followed(model, scale)
    assert max(apart.values()) < CLOSE, apart


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2)])
def test_matrices_that_fsdp_has_cut_step_as_wholes(mesh):
    for apart in pool(math.prod(mesh)).run(followed, "llama", "match_rms_adamw", "BlockwiseMuon", mesh):
        assert max(apart.values()) < CLOSE, apart


def test_the_other_half_may_be_adam_mini():
    apart = followed("gpt2", kind="BlockwiseMuonMini")
    assert max(apart.values()) < CLOSE, apart
    for apart in pool(2).run(followed, "llama", "match_rms_adamw", "BlockwiseMuonMini"):
        assert max(apart.values()) < CLOSE, apart


@pytest.mark.parametrize("model, ranks, limit", [("gpt2", 4, 1 << 25), ("gpt_neox", 3, 1000), ("llama", 4, 1)])
def test_cuts_anywhere_change_nothing(model, ranks, limit):
    for seed in range(3):
        assert pool(ranks).run(cut_anywhere, model, seed, limit) == [[]] * ranks


def test_rounds_are_bounded_and_the_work_is_shared():
    model = make("llama")
    layouts = {name: layout for name, layout in map_blocks(model).items() if "proj" in name}
    shards = ShardMap([], {n: ShardBoundaries(np.arange(1, 4) * (layout.numel // 4)) for n, layout in layouts.items()})
    found = {}
    for limit in (1, 3000, 1 << 25):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matrix_exchange, "ROUND", limit)
            found[limit] = matrix_exchange.rounds_of(shards, layouts)
    for limit, rounds in found.items():
        assert [route.name for of in rounds for route in of] == list(layouts)
        for of in rounds:
            for owner in range(4):
                owned = [route.shards.numel for route in of if route.shards.owner == owner]
                assert len(owned) < 2 or sum(owned) <= limit
    assert len(found[1]) > len(found[3000]) > len(found[1 << 25]) == 1
    counts = Counter(route.shards.owner for route in found[1 << 25][0])
    assert sorted(counts) == [0, 1, 2, 3] and max(counts.values()) <= 5


def test_which_parameters_it_steps():
    model = make("gpt2")
    ours = BlockwiseMuon(model.named_parameters(), block_map=map_blocks(model))
    matrices = {name for name, p in model.named_parameters() if ours.is_matrix(p)}
    assert matrices == {
        f"transformer.h.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert ours.block_lr_ratios["embedding"] == 10 and ours.block_lr_ratios["qk"] == 1


def test_stacked_experts_are_orthogonalized_each():
    stack = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalized(stack, 5).float())
    assert singular.min() > 0.5 and singular.max() < 1.3
    for one, alone in zip(orthogonalized(stack, 5), stack):
        torch.testing.assert_close(one, orthogonalized(alone[None], 5)[0], rtol=0.02, atol=0.02)


def test_a_resumed_run_goes_on():
    def run(steps, state=None, model=None):
        model = model or make("llama")
        ours = BlockwiseMuon(model.named_parameters(), block_map=map_blocks(model), **OURS)
        if state is not None:
            ours.load_state_dict(state)
        for number in steps:
            generator = torch.Generator().manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            ours.step()
        return model, ours.state_dict()

    whole, _ = run(range(4))
    half, state = run(range(2))
    resumed, _ = run(range(2, 4), state, half)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))


def test_its_state_does_not_go_on_as_adamws():
    model = make("llama")
    ours = BlockwiseMuon(model.named_parameters(), block_map=map_blocks(model), **OURS)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    ours.step()
    accepting = {"accept_mismatch": ["optimizer", "block_lr_ratios"], **OURS}
    with pytest.raises(CheckpointError, match="keeps no exp_avg_sq of hidden matrices"):
        BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model), **accepting).load_state_dict(
            ours.state_dict()
        )
    mini = BlockwiseMuonMini(model.named_parameters(), block_map=map_blocks(model), **accepting)
    mini.load_state_dict(ours.state_dict())
    assert all(torch.equal(mini.state[p]["exp_avg"], ours.state[p]["exp_avg"]) for p in model.parameters())


@pytest.mark.parametrize(
    "options, words",
    [({"ns_steps": 0}, "from 1 to 99"), ({"momentum": 1.0}, "below 1"), ({"matrix_scale": "rms"}, "use one of")],
)
def test_bad_options(options, words):
    with pytest.raises(BlockError, match=words):
        BlockwiseMuon(make("llama").named_parameters(), **options)
