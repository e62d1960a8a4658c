"""What is put right of older DeepSpeeds goes with the installed one too; tests/matrix runs the old ones themselves."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed_door.engines import config, start, train
from ranks import pool
from twins import make

from blockwise_lr.patches.variants import Variants


def norms(stage, divided):
    """Norms of the gradients of two updates of two micro batches, with DeepSpeed's own division or ours."""
    from blockwise_lr.deepspeed import engine as attaching

    before = attaching.DIVIDES_AT_EACH_OUTPUT
    attaching.DIVIDES_AT_EACH_OUTPUT = Variants("deepspeed", {">=0": divided})
    try:
        engine = start(make("llama"), config("BlockwiseAdamW", stage, gradient_clipping=1e9))
    finally:
        attaching.DIVIDES_AT_EACH_OUTPUT = before
    found = []
    for step in range(2):
        losses = train(engine, 1, first=step)
        found.append((float(engine.get_global_grad_norm()), losses))
    engine.destroy()
    return found, "backward" in vars(engine)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_that_is_divided_gives_the_gradients_that_are(stage):
    (own, replaced), (divided, was_replaced) = (pool(1).run(norms, stage, way)[0] for way in (False, True))
    assert (replaced, was_replaced) == (False, True)
    assert [norm for norm, _ in divided] == pytest.approx([norm for norm, _ in own], rel=1e-6)
    assert [losses for _, losses in divided] == [losses for _, losses in own]


@pytest.mark.parametrize("size, refused", [(-1, False), (2, True)])
def test_mics_is_refused(size, refused):
    """As DeepSpeed before 0.19.6 reads it; later ones refuse the key."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from blockwise_lr.blocks import BlockError
    from blockwise_lr.deepspeed.unsupported import refuse_unsupported

    settings = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    settings.zero_config = SimpleNamespace(**{**dict(settings.zero_config), "mics_shard_size": size})
    if not refused:
        refuse_unsupported(settings, torch.nn.Linear(2, 2), None, None)
        return
    with pytest.raises(BlockError, match=r"zero_optimization.mics_shard_size \(MiCS, here 2\).*; remove it, or"):
        refuse_unsupported(settings, torch.nn.Linear(2, 2), None, None)


def gathered(rounds, without=False):
    """How often a parameter was not whole right after several had been gathered in one call, a large one first."""
    import deepspeed

    import blockwise_lr.deepspeed  # noqa: F401
    from blockwise_lr.patches.deepspeed_gathers import PATCH

    deepspeed.init_distributed("gloo")
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    if without:
        PATCH.undo()
    try:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = torch.nn.ModuleList(torch.nn.Embedding(size, 1) for size in (4_000_000, 1_000_000, 1))
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            for number, p in enumerate(parameters, 1):
                p.data.fill_(number)
        wrong = 0
        for _ in range(rounds):
            with deepspeed.zero.GatheredParameters(parameters):
                wrong += any(bool((p != number).any()) for number, p in enumerate(parameters, 1))
        return wrong
    finally:
        PATCH.apply()


def test_parameters_are_whole_once_they_are_gathered():
    assert pool(2).run(gathered, 20) == [0, 0]
