"""Signal and noise of gradients beside those of plain backward passes, by block type of the unfused twin."""

import math

import pytest
import torch
from deepspeed_door.engines import config, start
from ranks import pool
from twins import VOCABULARY, Twin, make

from blockwise_lr import BlockError, BlockType
from blockwise_lr.measure import Noise, measure_gradient_noise


def ids(count):
    return list(torch.randint(0, VOCABULARY, (count, 2, 9), generator=torch.Generator().manual_seed(3)))


def gradients(kind, model, batch):
    """Block type -> the twin's flat gradient of the mean loss."""
    twin, found = Twin(kind, model), {}
    out = torch.func.functional_call(model, twin.values(), (batch,), {"labels": batch})
    leaves = list(twin.leaves.values())
    for leaf, grad in zip(leaves, torch.autograd.grad(out.loss, [leaf.tensor for leaf in leaves])):
        found.setdefault(leaf.block, []).append(grad.flatten())
    return {block: torch.cat(parts) for block, parts in found.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pairs_of_batches_give_signal_and_noise(kind):
    model, batches = make(kind), ids(4)
    found = measure_gradient_noise(model, batches)
    every = [gradients(kind, model, batch) for batch in batches]
    assert found.tokens == 16 and {block.value for block in found.blocks()} == set(every[0])
    for block, noise in found.blocks().items():
        one, two, three, four = (grads[block.value] for grads in every)
        assert noise.signals == pytest.approx((float(one @ two), float(three @ four)), rel=1e-4, abs=1e-9)
        assert noise.noises == pytest.approx(
            (float((one - two).square().sum()) / 2, float((three - four).square().sum()) / 2)
        )
        figures = found.as_dict()["blocks"][block.value]
        assert figures["signal_to_noise"] == noise.ratio
        assert figures["noise_scale"] == pytest.approx(16 / noise.ratio if noise.ratio > 0 else math.inf)


def test_it_is_the_signal_over_the_noise_of_drawn_gradients():
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([0.3, -0.2, 0.1]), 0.5
    drawn = mean + spread * torch.randn(4000, 2, 3, generator=generator)
    noise = Noise(
        tuple((drawn[:, 0] * drawn[:, 1]).sum(1).tolist()),
        tuple(((drawn[:, 0] - drawn[:, 1]).square().sum(1) / 2).tolist()),
    )
    wanted = float(mean.square().sum()) / (3 * spread**2)
    assert abs(noise.ratio - wanted) < 4 * noise.error and noise.error < 0.1 * wanted
    assert math.isnan(Noise((1.0,), (1.0,)).error)


def test_labels_that_do_not_count_are_left_out():
    model, (first, second) = make("llama"), ids(2)
    labels = first.clone()
    labels[1] = -100
    found = measure_gradient_noise(model, [{"input_ids": first, "labels": labels}, second])
    one, two = (gradients("llama", model, batch) for batch in (first[:1], second))
    assert found.tokens == 12
    assert found.blocks()[BlockType.QK].signals == pytest.approx((float(one["qk"] @ two["qk"]),), rel=1e-4)


def on_two_ranks(stage):
    import torch.distributed as dist

    engine = start(make("llama"), config("BlockwiseAdamW", stage))
    found = measure_gradient_noise(engine.module, ids(4)[2 * dist.get_rank() :][:2])
    engine.destroy()
    return found


def test_ranks_put_their_pairs_together_and_shards_are_refused():
    first, second = pool(2).run(on_two_ranks, 1)
    assert first == second
    whole = measure_gradient_noise(make("llama"), ids(4)).blocks()
    for block, noise in first.blocks().items():
        assert noise.signals == pytest.approx(whole[block].signals, rel=1e-4, abs=1e-9)
    for error in pool(2).run(on_two_ranks, 3, errors=True):
        assert "is sharded over ranks" in str(error)


@pytest.mark.parametrize("count", [0, 3])
def test_batches_come_in_pairs(count):
    with pytest.raises(BlockError, match=f"there are {count} batches, and they are measured in pairs"):
        measure_gradient_noise(make("llama"), ids(count))
