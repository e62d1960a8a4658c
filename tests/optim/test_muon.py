"""Muon with block rates against torch.optim.Muon on matrices that are taken apart beforehand."""

import pytest
import torch
from optim.muon import OURS, followed, in_deepspeed
from ranks import pool
from twins import make

from blockwise_lr import BlockError, BlockwiseMuon, map_blocks
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_matrices_that_fsdp_has_cut_step_as_wholes(ranks):
    for apart in pool(ranks).run(followed, "llama"):
        assert max(apart.values()) < CLOSE, apart


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


def test_in_deepspeed_stage_0_trains_and_shards_are_refused():
    assert max(pool(2).run(in_deepspeed, 0)) < CLOSE
    for error in pool(2).run(in_deepspeed, 1, errors=True):
        assert "BlockwiseMuon needs whole matrices" in str(error)


@pytest.mark.parametrize(
    "options, words",
    [({"ns_steps": 0}, "from 1 to 99"), ({"momentum": 1.0}, "below 1"), ({"matrix_scale": "rms"}, "use one of")],
)
def test_bad_options(options, words):
    with pytest.raises(BlockError, match=words):
        BlockwiseMuon(make("llama").named_parameters(), **options)
