"""Second moments per segment to elements and back: exact, and averaged as written out by hand."""

import pytest
import torch
from twins import MODELS, make

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, map_blocks
from blockwise_lr.checkpoint import MismatchError
from blockwise_lr.checkpoint.moments import expand_segments, segment_means, segment_sums, take_segments


def optimizer_for(kind, **settings):
    model = make(kind)
    return model, BlockwiseAdamMini(
        model.named_parameters(), block_map=map_blocks(model), kernel="reference", **settings
    )


@pytest.mark.parametrize("bias_segments", ["element", "vector"])
@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_is_exact(kind, bias_segments):
    model, optimizer = optimizer_for(kind, bias_segments=bias_segments)
    for p in model.parameters():
        plan = optimizer.plan_of(p)
        moments = torch.rand(plan.slots)
        elements = expand_segments(moments, plan)
        assert torch.equal(take_segments(elements, plan), moments)
        assert len(elements.unique()) == len(moments.unique())  # every segment has elements, and no element is left out
        assert torch.equal(
            segment_means(segment_sums(elements, plan), plan, plan.local)
            + segment_means(segment_sums(elements, plan), plan, plan.shared),
            moments,
        )


def averaged(kind, name, value):
    model, optimizer = optimizer_for(kind)
    parameter = model.get_parameter(name)
    plan = optimizer.plan_of(parameter)
    sums = segment_sums(value.reshape(-1), plan)
    return expand_segments(
        segment_means(sums, plan, plan.local) + segment_means(sums, plan, plan.shared), plan
    ).view_as(value)


def test_means_of_gpt2s_fused_columns():
    value = torch.rand(24, 72)  # q, k, v of 4 heads of 6 columns each
    found = averaged("gpt2", "transformer.h.0.attn.c_attn.weight", value)
    for head in range(8):
        columns = slice(6 * head, 6 * head + 6)
        assert torch.allclose(found[:, columns], value[:, columns].mean().expand(24, 6), rtol=1e-6)
    assert torch.allclose(found[:, 48:], value[:, 48:].mean(0).expand(24, 24), rtol=1e-6)


def test_means_of_gpt_neoxs_rows_fused_per_head():
    value = torch.rand(96, 32)  # 4 heads of 8 rows of q, k and v each
    found = averaged("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", value).view(4, 3, 8, 32)
    rows = value.view(4, 3, 8, 32)
    assert torch.allclose(found[:, :2], rows[:, :2].mean((2, 3), keepdim=True).expand(4, 2, 8, 32), rtol=1e-6)
    assert torch.allclose(found[:, 2], rows[:, 2].mean(2, keepdim=True).expand(4, 8, 32), rtol=1e-6)


def stepped(kind, cls, dtype=torch.float32, seed=1, **settings):
    model = make(kind).to(dtype)
    optimizer = cls(model.named_parameters(), block_map=map_blocks(model), kernel="reference", **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("cls", [BlockwiseAdamW, BlockwiseAdamMini])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_pytorch_state_dicts_come_back_to_the_bit(cls, dtype, tmp_path):
    _, optimizer = stepped("gpt2", cls, dtype)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _, other = stepped("gpt2", cls, dtype, seed=2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for mine, theirs in zip(optimizer.state.values(), other.state.values()):
        assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)


def test_a_segment_shaped_state_continues_as_adamw():
    _, mini = stepped("gpt_neox", BlockwiseAdamMini)
    saved = mini.state_dict()
    _, adamw = stepped("gpt_neox", BlockwiseAdamW, seed=2)
    with pytest.raises(MismatchError, match='"accept_mismatch": \\["optimizer"\\]'):
        adamw.load_state_dict(saved)
    _, adamw = stepped("gpt_neox", BlockwiseAdamW, seed=2, accept_mismatch=["optimizer"])
    adamw.load_state_dict(saved)
    for before, after in zip(mini.param_groups[0]["params"], adamw.param_groups[0]["params"]):
        elements = adamw.state[after]["exp_avg_sq"]
        assert elements.shape == after.shape
        assert torch.equal(
            elements.reshape(-1), expand_segments(mini.state[before]["exp_avg_sq"], mini.plan_of(before))
        )
