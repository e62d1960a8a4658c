"""What updates do to the loss, against derivatives by automatic differentiation in the unfused twin."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import pool
from torch.nn.attention import SDPBackend, sdpa_kernel
from twins import VOCABULARY, Twin, make, token_ids

from blockwise_lr import BlockError, BlockType, BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, map_blocks
from blockwise_lr.measure import AutoRatios, Updates, measure_updates, rebalanced, snapshot
from blockwise_lr.schedules import BlockwiseWarmupCosine, warmup_cosine

IDS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))


def moved(kind, scale):
    """A float64 model, what it was, and a step by which every element moved as an optimizer's would."""
    model = make(kind).double()
    before = snapshot(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model, before


def exact(kind, model, before):
    """Block type -> slope and curvature along its part of the move, by forward differentiation."""
    ends = Twin(kind, model).leaves
    started = make(kind).double()
    started.load_state_dict({**started.state_dict(), **before})
    twin = Twin(kind, started)
    names, targets = list(twin.leaves), IDS[:, 1:].flatten()
    starts = [twin.leaves[name].tensor.detach().clone() for name in names]

    def log_p(*tensors):
        for name, tensor in zip(names, tensors):
            twin.leaves[name].tensor = tensor
        out = torch.func.functional_call(started, twin.values(), (IDS,))
        return out.logits[:, :-1].flatten(0, 1).log_softmax(-1)

    found = {}
    for block in {leaf.block for leaf in ends.values()}:
        direction = [
            (ends[name].tensor.detach() - start) * (ends[name].block == block) for name, start in zip(names, starts)
        ]
        with sdpa_kernel(SDPBackend.MATH):
            value, change = torch.func.jvp(log_p, tuple(starts), tuple(direction))
        p = value.exp()
        variance = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
        found[block] = float(-change.gather(1, targets[:, None]).mean()), float(variance.mean())
    return found


# transformers' RMSNorm computes in float32, which a smaller move would show
@pytest.mark.parametrize("kind, scale, exactness", [("llama", 1e-4, 3e-3), ("gpt2", 1e-7, 1e-4)])
def test_slope_and_curvature_are_the_derivatives_along_the_move(kind, scale, exactness):
    model, before = moved(kind, scale)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = exact(kind, model, before)
    found = measure_updates(model, before, [IDS])
    assert {block.value for block in found.blocks} == set(wanted) and found.tokens == 24
    steepest = max(abs(slope) for slope, _ in wanted.values())
    for number, block in enumerate(found.blocks):
        slope, curvature = wanted[block.value]
        assert found.slopes[0, number] == pytest.approx(slope, rel=exactness, abs=exactness / 10 * steepest)
        assert found.curvatures[0, number, number] == pytest.approx(curvature, rel=exactness)
        assert found.multipliers()[block][0] == -found.slopes[0, number] / found.curvatures[0, number, number]
        assert found.moved[number] == pytest.approx(scale, rel=0.2)
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())


def test_the_gram_of_all_blocks_is_that_of_the_whole_move():
    """Curvatures of all pairs add up to the curvature along the whole step."""
    model, before = moved("gpt2", 1e-6)
    found = measure_updates(model, before, [IDS])
    after = snapshot(model)
    with torch.no_grad():
        still = torch.func.functional_call(model, before, (IDS,)).logits[:, :-1].flatten(0, 1)
        change = torch.func.functional_call(model, after, (IDS,)).logits[:, :-1].flatten(0, 1) - still
    p = still.softmax(-1)
    whole = ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean()
    assert found.curvatures[0].sum() == pytest.approx(float(whole), rel=1e-3)
    loss = F.cross_entropy(still + 1e-3 * change, IDS[:, 1:].flatten()) - F.cross_entropy(still, IDS[:, 1:].flatten())
    assert 1e-3 * found.slopes[0].sum() == pytest.approx(float(loss), rel=1e-3)


def test_batches_give_the_error():
    model, before = moved("llama", 1e-4)
    batches = [IDS.roll(shift, 1) for shift in range(6)]
    found = measure_updates(model, before, batches)
    assert found.slopes.shape == (6, len(found.blocks)) and found.tokens == 6 * 24
    alone = [measure_updates(model, before, [batch]) for batch in batches]
    np.testing.assert_allclose(found.slopes, np.concatenate([one.slopes for one in alone]))
    for block, (multiplier, error) in found.multipliers().items():
        others = []
        for left in range(6):
            rest = measure_updates(model, before, batches[:left] + batches[left + 1 :])
            others.append(rest.multipliers()[block][0])
        assert error == pytest.approx(math.sqrt(np.var(others) * 5))
        assert math.isfinite(multiplier) and math.isnan(alone[0].multipliers()[block][1])


def trained(measured, kind=BlockwiseAdamW, steps=6, auto=False):
    model = make("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    optimizer = kind(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
    schedule = BlockwiseWarmupCosine(optimizer, 20, 2)
    at = {3, 5} if auto else ()
    stepper = AutoRatios(model, optimizer, lambda: [IDS, IDS.flip(1)], at)
    torch.manual_seed(5)
    for batch in token_ids(steps, 1, 1)[:, 0, 0]:
        model.train()
        model(batch, labels=batch).loss.backward()
        before = snapshot(model)
        stepper.step()
        if measured:
            measure_updates(model, before, [IDS])
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule, stepper


@pytest.mark.parametrize("kind", [BlockwiseAdamW, BlockwiseAdamMini, BlockwiseLion])
def test_training_goes_on_to_the_bit(kind):
    pairs = zip(trained(True, kind)[0].parameters(), trained(False, kind)[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def updates(**multipliers):
    """Updates with these multipliers, of blocks of 100 elements but for 10,000 of the FFN."""
    blocks = tuple(BlockType(block) for block in multipliers)
    curvatures = np.eye(len(blocks))[None]
    slopes = -np.array([list(multipliers.values())], dtype=float)
    numel = tuple(10_000 if block is BlockType.FFN else 100 for block in blocks)
    return Updates(blocks, slopes, curvatures, numel, (1.0,) * len(blocks), (1.0,) * len(blocks), 1)


def test_ratios_move_towards_equal_multipliers():
    ratios = dict.fromkeys(BlockType, 2.0)
    new = rebalanced(ratios, updates(ffn=0.5, embedding=2.0, norm=-1.0, qk=50.0), power=0.5, most=4.0)
    weights = {BlockType.FFN: 10_000, BlockType.EMBEDDING: 100, BlockType.NORM: 100, BlockType.QK: 100}
    mean = sum(numel * math.log(new[block]) for block, numel in weights.items()) / 10_300
    assert mean == pytest.approx(math.log(2.0), abs=0.02)  # most weights' rate stays
    assert new[BlockType.EMBEDDING] / new[BlockType.FFN] == pytest.approx(2.0)  # sqrt(2.0 / 0.5)
    assert new[BlockType.QK] == pytest.approx(8.0, rel=0.01)  # most
    assert new[BlockType.NORM] == pytest.approx(0.5, rel=0.01)
    assert new[BlockType.VO] == 2.0
    assert rebalanced(ratios, updates(ffn=3.0, qk=3.0)) == pytest.approx(ratios)


def test_auto_measures_when_due_and_its_ratios_are_saved():
    _, optimizer, schedule, auto = trained(False, auto=True)
    assert [number for number, _, _ in auto.history] == [3, 5]
    ratios = optimizer.block_lr_ratios
    assert ratios == auto.history[-1][2] != optimizer.initial_settings[0]["block_lr_ratios"]
    weight = warmup_cosine(schedule.last_epoch + 1, schedule.curve.warmup_num_steps, schedule.curve.total_num_steps)
    for block, rate in optimizer.block_lrs()[0].items():
        assert rate == pytest.approx(weight[0] * 1e-3 * ratios[BlockType(block)] + weight[1] * 5e-5)
    model = make("gpt2")
    fresh = BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.block_lr_ratios == ratios
    before = optimizer.block_lrs()[0]
    optimizer.set_block_lr_ratios({"qk": 2 * ratios[BlockType.QK]})
    after = optimizer.block_lrs()[0]  # until the schedule's next step, what it stated moves along
    assert after["qk"] == pytest.approx(2 * before["qk"]) and after["ffn"] == before["ffn"]
    assert optimizer.block_lr_ratios[BlockType.FFN] == ratios[BlockType.FFN]  # those not named stay


def on_ranks():
    """DDP: what two ranks find with batches of their own."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, before = moved("llama", 1e-4)
    ids = [IDS, IDS.flip(1)]
    found = measure_updates(DistributedDataParallel(model).module, before, [ids[dist.get_rank()]])
    return found.as_dict(), measure_updates(model, before, ids).slopes, found.slopes


def test_ranks_find_the_same_together():
    (one, alone, together), (other, _, _) = pool(2).run(on_ranks)
    assert one == other and one["tokens"] == 48
    np.testing.assert_allclose(together, alone[:2])


def test_bad_input_is_refused():
    model, before = moved("llama", 1e-4)
    with pytest.raises(BlockError, match="no batch to measure on"):
        measure_updates(model, before, [])
    with pytest.raises(BlockError, match="the snapshot has no"):
        measure_updates(model, {}, [IDS])
    with pytest.raises(BlockError, match="predicts no token"):
        measure_updates(model, before, [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}])
    half = make("llama").bfloat16()
    with pytest.raises(BlockError, match="whose rounding hides a step"):
        measure_updates(half, snapshot(half), [IDS])
    with pytest.raises(BlockError, match="needs a blockwise optimizer, not AdamW"):
        AutoRatios(model, torch.optim.AdamW(model.parameters()), list, {1})
    with pytest.raises(BlockError, match="power is 2"):
        AutoRatios(model, BlockwiseAdamW(model.named_parameters()), list, {1}, power=2)
