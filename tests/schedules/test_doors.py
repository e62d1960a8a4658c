"""The schedules through real DeepSpeed engines and Megatron's own scheduler, resumed, against their closed forms."""

import argparse
import tempfile

import pytest
from ranks import pool
from schedules.closed_forms import fall, official_wsd, up, warmup_then
from twins import RATIOS


def stepped(engine, steps, lr_kwargs=None):
    """The rates of each of so many updates."""
    import torch.distributed as dist
    from twins import token_ids

    from blockwise_lr.deepspeed import block_lrs

    seen = []
    for number in range(steps):
        seen.append({block: rate for block, rate in block_lrs(engine)[0].items() if block in RATIOS})
        ids = token_ids(steps, 1, dist.get_world_size())[number, 0, dist.get_rank()]
        engine.backward(engine(ids, labels=ids).loss)
        engine.step(lr_kwargs=lr_kwargs)
    return seen


def rewarmed(stage):
    """A run under the paper's schedule that stops at its end; then one with new data, stopped and resumed."""
    from deepspeed_door.engines import config, start
    from twins import make

    rewarm = {
        "type": "BlockwiseRewarm",
        "params": {"total_num_steps": 8, "warmup_num_steps": 3, "begin_num_steps": 4, "min_lr": 1e-4},
    }
    folder, seen = tempfile.mkdtemp(), []
    for scheduler, steps in ((None, 4), (rewarm, 5), (rewarm, 4)):
        settings = config("BlockwiseAdamW", stage, steps=4, scheduler=scheduler, gradient_accumulation_steps=1)
        engine = start(make("llama"), settings)
        if scheduler:
            engine.load_checkpoint(folder)
        seen.append(stepped(engine, steps))
        engine.save_checkpoint(folder)
        engine.destroy()
    return seen


@pytest.mark.parametrize("stage", [1, 3])
def test_rewarming_in_deepspeed_begins_where_the_checkpoint_ended(stage):
    from deepspeed_door.engines import LR, MIN_LR, WARMUP

    for first, *new in pool(1).run(rewarmed, stage):
        for step, found in enumerate(first, 1):
            assert found == pytest.approx(
                {b: warmup_then("cosine")(step, r * LR, LR, MIN_LR, WARMUP, 4) for b, r in RATIOS.items()}
            )
        for step, found in enumerate([rates for part in new for rates in part], 1):
            closed = {
                b: up(step, r * LR, 3, MIN_LR) if step <= 3 else fall("cosine", r * LR, MIN_LR, min((step - 3) / 5, 1))
                for b, r in RATIOS.items()
            }
            assert found == pytest.approx(closed)


def by_tokens():
    from deepspeed_door.engines import config, start
    from twins import make

    linear = {
        "type": "BlockwiseWarmupLinear",
        "params": {"total_num_steps": 480, "min_lr": 1e-4, "tokens_per_step": 24},
    }
    engine = start(make("llama"), config("BlockwiseAdamW", 2, scheduler=linear, gradient_accumulation_steps=1))
    seen = stepped(engine, 4, {"tokens": 12})
    engine.destroy()
    return seen


def test_deepspeed_hands_on_how_many_tokens_a_step_had():
    from deepspeed_door.engines import LR, MIN_LR

    for seen in pool(1).run(by_tokens):
        for found, tokens in zip(seen, (24, 24, 36, 48)):  # after the first, steps are taken to be as long as the last
            assert found["qk"] == pytest.approx(fall("linear", 8 * LR, MIN_LR, tokens / 480))


def in_megatron(settings, steps, resumed_at):
    from megatron_door.layouts import Layout, build_chunks, megatron
    from megatron_door.training import make_optimizer, make_scheduler, wrap

    import blockwise_lr.megatron
    from blockwise_lr.megatron.build import current_block_lrs

    layout = Layout(distributed=True)
    with megatron(layout):
        undo = blockwise_lr.megatron.register(block_schedule=settings, block_lr_ratios="paper")
        try:
            ours = make_optimizer(wrap(build_chunks("gpt", layout), layout), "blockwise_adamw", layout)
            scheduler, seen = make_scheduler(ours), []
            for step in range(steps):
                if step == resumed_at:
                    saved = scheduler.state_dict()
                    scheduler = make_scheduler(ours)
                    scheduler.load_state_dict(saved)
                seen.append(({b: lr for b, (lr,) in current_block_lrs(ours).items()}, ours.param_groups[0]["lr"]))
                scheduler.step(6)  # samples
            return seen
        finally:
            undo()


def test_megatrons_scheduler_takes_a_block_schedule():
    pytest.importorskip("megatron.core")
    from megatron_door.training import LR, MIN_LR

    settings = {
        "type": "BlockwiseWSD",
        "total_num_steps": 12,
        "warmup_num_steps": 2,
        "meet_lr": "lr",
        "samples_per_step": 6,
    }
    for seen in pool(1).run(in_megatron, settings, 14, 7):
        for step, (rates, base) in enumerate(seen, 1):
            assert rates == pytest.approx({b: official_wsd(step, RATIOS[b] * LR, LR, MIN_LR, 2, 12) for b in rates})
            assert base == pytest.approx(official_wsd(step, LR, LR, MIN_LR, 2, 12))


@pytest.fixture
def parse(monkeypatch):
    pytest.importorskip("megatron.core")
    from blockwise_lr.megatron import settings

    monkeypatch.setattr(settings, "_asked", None)

    def parsed(*flags):
        parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
        return settings.add_arguments(parser).parse_args(flags)

    return parsed


def test_a_block_schedule_is_a_flag(parse):
    from blockwise_lr import BlockError
    from blockwise_lr.megatron.settings import _from_flags

    words = ["BlockwiseInfinite", "cooldown_num_steps=50", "constant_factor=0.5", "warmup_num_steps=auto"]
    arguments = parse("--block-schedule", *words, 'block_warmup={"qk":2}')
    found = _from_flags("blockwise_adamw", arguments).block_schedule
    assert found == {
        "type": "BlockwiseInfinite",
        "cooldown_num_steps": 50,
        "constant_factor": 0.5,
        "warmup_num_steps": "auto",
        "block_warmup": {"qk": 2},
    }
    arguments.lr_warmup_iters = 10
    with pytest.raises(BlockError, match="--lr-warmup-iters is 10 and --block-schedule takes the place"):
        _from_flags("blockwise_adamw", arguments)


@pytest.mark.parametrize(
    "words, told",
    [
        (["BlockwiseWsd", "total_num_steps=10"], "did you mean 'BlockwiseWSD'"),
        (["BlockwiseWSD"], "total_num_steps is missing"),
        (["BlockwiseWSD", "total_num_steps=10", "min_lr=0.1"], "min_lr is Megatron's own --min-lr"),
        (["BlockwiseWSD", "total_num_steps=10", "decay=3"], "unknown parameter 'decay'"),
        (["BlockwiseWSD", "total_num_steps=10", "total_num_steps=11"], "each setting once"),
        (["BlockwiseRewarm", "total_num_steps=10"], "start_lr must be a rate under Megatron"),
    ],
)
def test_bad_block_schedules_are_refused_as_flags(words, told, parse):
    with pytest.raises(argparse.ArgumentError, match=told):
        parse("--block-schedule", *words)
