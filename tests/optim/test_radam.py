"""RAdam against torch.optim.RAdam, and what its first steps do."""

import pytest
import torch
from twins import RATIOS, Twin, make

from blockwise_lr import BlockError, BlockwiseRAdam, map_blocks
from blockwise_lr.kernels import usable
from blockwise_lr.rules.radam import rectification

LR, PAPER = 2e-3, {"block_lr_ratios": "paper"}
KERNELS = [name for name in ("reference", "cpp") if usable()[name].startswith("yes")]


def trained(optimizer, model, steps, scale=1.0):
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * scale
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def theirs(model, **options):
    """torch's RAdam with a group per block type and decay."""
    twin = Twin("llama", model)
    groups = [
        {"params": [p], "lr": LR * RATIOS[leaf.block], "weight_decay": 0.1 if leaf.decayed else 0.0}
        for p, leaf in ((p, twin.leaves[name]) for name, p in model.named_parameters())
    ]
    return torch.optim.RAdam(groups, decoupled_weight_decay=True, foreach=False, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.7)])
def test_with_sgd_it_is_torchs(betas, kernel):
    model, plain = make("llama"), make("llama")
    ours = BlockwiseRAdam(
        model.named_parameters(), LR, betas, block_map=map_blocks(model), unrectified="sgd", kernel=kernel, **PAPER
    )
    found, wanted = trained(ours, model, 12), trained(theirs(plain, betas=betas), plain, 12)
    if kernel == "reference":
        assert all(torch.equal(p, q) for p, q in zip(found, wanted))
    else:
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_steps_that_cannot_be_rectified_leave_the_weights_and_keep_the_moments(kernel):
    model, plain = make("llama"), make("llama")
    before = [p.detach().clone() for p in model.parameters()]
    ours = BlockwiseRAdam(model.named_parameters(), LR, block_map=map_blocks(model), kernel=kernel, **PAPER)
    reference = theirs(plain, betas=(0.9, 0.95))
    assert all(torch.equal(p, q) for p, q in zip(trained(ours, model, 5, scale=100.0), before))
    for group in reference.param_groups:
        group["lr"], group["kept"] = 0.0, group["lr"]
    trained(reference, plain, 5, scale=100.0)
    for group in reference.param_groups:
        group["lr"] = group["kept"]
    found, wanted = trained(ours, model, 4), trained(reference, plain, 4)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-7)


def test_why_the_first_steps_are_skipped():
    """torch moves by the gradient's size in them, whatever it is."""
    model = make("llama")
    before = [p.detach().clone() for p in model.parameters()]
    ours = BlockwiseRAdam(
        model.named_parameters(), LR, block_map=map_blocks(model), unrectified="sgd", weight_decay=0.0
    )
    moved = [(p - q).abs().max() for p, q in zip(trained(ours, model, 1, scale=100.0), before)]
    assert max(moved) > 100 * LR * RATIOS["embedding"]


@pytest.mark.parametrize(
    "beta2, sixth, half, nine_tenths",
    [(0.9, 0.255, 11, 31), (0.95, 0.182, 16, 58), (0.98, 0.116, 33, 140), (0.999, 0.026, 556, 2737)],
)
def test_the_factor_that_rectifies(beta2, sixth, half, nine_tenths):
    factors = [rectification(beta2, step) or 0.0 for step in range(1, 3000)]
    assert factors[:5] == [0.0] * 5 and factors[5] == pytest.approx(sixth, abs=6e-4)
    assert next(step for step, factor in enumerate(factors, 1) if factor >= 0.5) == half
    assert next(step for step, factor in enumerate(factors, 1) if factor >= 0.9) == nine_tenths
    assert rectification(beta2, 5, above=4) is not None and rectification(beta2, 4, above=4) is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"betas": (0.9, 0.6)}, "no step is ever rectified"),
        ({"rectify_above": 3}, "give 4 or above"),
        ({"unrectified": "adam"}, "use one of skip, sgd"),
    ],
)
def test_settings_that_never_train_are_refused(options, words):
    with pytest.raises(BlockError, match=words):
        BlockwiseRAdam(make("llama").named_parameters(), **options)
