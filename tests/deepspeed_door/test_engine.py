"""What an engine with our optimizer offers and costs: collectives, memory, learning rates, the user's own groups."""

import glob

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import CLIP, DECAY, LR, MIN_LR, WARMUP, config, start, train, weights
from ranks import pool
from references import once
from twins import RATIOS, Twin, make, paper_lr, token_ids, worst_difference

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"


def two_groups(model):
    """The usual split of a user's own groups, with weight decays of their own."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.01},
    ]


def collectives(kind, stage, zero, grouped):
    """How many collectives one update takes, forward and backward included, as torch's profiler counts gloo's."""
    model = make("llama")
    settings = config(kind, stage, zero=zero)
    if kind == "AdamW":
        settings["optimizer"]["params"] = {"lr": LR, "torch_adam": True}
        settings["scheduler"] = {"type": "WarmupLR", "params": {}}
    engine = start(model, settings, model_parameters=two_groups(model) if grouped else None)
    train(engine, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(engine, 1, first=1)
    engine.destroy()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:"))


@pytest.mark.parametrize(
    "stage, zero, grouped",
    [(1, {}, False), (2, {}, False), (2, {}, True), (3, {}, False), (3, {"sub_group_size": 3000}, False)],
)
def test_collectives_do_not_grow_with_block_types(stage, zero, grouped):
    torch_count = pool(2).run(collectives, "AdamW", stage, zero, grouped)
    assert torch_count[0] > 2
    assert pool(2).run(collectives, ADAMW, stage, zero, grouped) == torch_count
    mini = pool(2).run(collectives, MINI, stage, zero, grouped)
    assert mini == [count + 1 for count in torch_count]


def no_cut_no_collective():
    model = make("llama")
    engine = start(model, config(MINI, 2))
    sync = engine.basic_optimizer._sync
    return len(sync.over_shards) + len(sync.over_slices)


def test_nothing_is_reduced_when_nothing_is_cut():
    assert pool(1).run(no_cut_no_collective) == [0]


@once
def two_groups_by_one_process(ranks):
    """The weights of the twin with the decays of two_groups."""
    from deepspeed_door.engines import ACCUMULATION, BETAS, EPS
    from twins import REFERENCES

    twin = Twin("llama", make("llama"))
    optimizer = REFERENCES[ADAMW](twin, BETAS, EPS, DECAY, RATIOS)
    for group in optimizer.optimizer.param_groups:  # block type groups hold matrices or vectors, never both
        group["weight_decay"] = 0.05 if group["params"][0].dim() > 1 else 0.01
    for number, batch in enumerate(token_ids(10, ACCUMULATION, ranks), 1):
        for ids in batch.flatten(0, 1):
            twin.backward(ids, 1 / (ACCUMULATION * ranks))
        twin.clip(CLIP)
        optimizer.step(lambda ratio, number=number: paper_lr(number, ratio, LR, MIN_LR, WARMUP, 10))
    return {name: value.detach() for name, value in twin.values().items()}


def groups_case(stage):
    model = make("llama")
    engine = start(model, config(ADAMW, stage), model_parameters=two_groups(model))
    train(engine, 10)
    found = weights(engine)
    engine.destroy()
    return worst_difference(found, two_groups_by_one_process(dist.get_world_size()))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_users_groups_keep_their_weight_decay(stage):
    assert max(pool(2).run(groups_case, stage)) < 1e-5


def learning_rates(folder):
    import blockwise_lr.deepspeed

    engine = start(make("llama"), config(ADAMW, 1, tensorboard={"enabled": True, "output_path": folder}))
    seen = []
    for number in range(10):
        seen.append(blockwise_lr.deepspeed.block_lrs(engine)[0])
        train(engine, 1, first=number)
    engine.monitor.tb_monitor.summary_writer.close() if dist.get_rank() == 0 else None
    engine.destroy()
    return seen


def test_the_paper_schedule_is_visible(tmp_path):
    for seen in pool(2).run(learning_rates, str(tmp_path)):
        for number, lrs in enumerate(seen, 1):
            wanted = {block: paper_lr(number, ratio, LR, MIN_LR, WARMUP, 10) for block, ratio in RATIOS.items()}
            assert lrs == pytest.approx(wanted, rel=1e-12)
        assert seen[-1] == pytest.approx(dict.fromkeys(RATIOS, MIN_LR))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(glob.glob(f"{tmp_path}/**/events*", recursive=True)[0])
    events.Reload()
    scalars = events.Scalars("Train/Samples/lr_qk")
    assert len(scalars) == 10
    assert scalars[1].value == pytest.approx(paper_lr(3, 8.0, LR, MIN_LR, WARMUP, 10), rel=1e-6)


def state_bytes(kind, stage):
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=1000,
            tie_word_embeddings=False,
        )
    )
    engine = start(model, config(kind, stage))
    train(engine, 1)
    optimizer = engine.basic_optimizer
    total = sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    )
    engine.destroy()
    return total


@pytest.mark.parametrize("stage", [2, 3])
def test_adam_mini_halves_the_optimizer_state(stage):
    adamw, mini = pool(2).run(state_bytes, ADAMW, stage), pool(2).run(state_bytes, MINI, stage)
    for ours, theirs in zip(mini, adamw):
        assert ours <= 0.505 * theirs


def overflowing():
    """A step with infinite gradients under fp16 is skipped whole: no count, no decay, and the loss scale halves."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    settings = config(ADAMW, 2, dtype="fp16")
    settings["fp16"].update(initial_scale_power=32, hysteresis=1)
    engine = start(make("gpt2"), settings)
    before = weights(engine)
    train(engine, 2)
    skipped, steps = engine.skipped_steps, [int(s["step"]) for s in engine.basic_optimizer.state.values()]
    after = weights(engine)
    train(engine, 24, first=2)
    trained_steps = [int(s["step"]) for s in engine.basic_optimizer.state.values()]
    total, scale = engine.skipped_steps, engine.optimizer.cur_scale
    engine.destroy()
    return skipped, steps, all(torch.equal(before[n], after[n]) for n in before), trained_steps[0] + total, scale


def test_overflows_under_a_dynamic_loss_scale_are_skipped():
    for skipped, steps, unchanged, total, scale in pool(2).run(overflowing):
        assert skipped == 2 and steps in ([], [0]) and unchanged
        assert total == 26 and scale < 2**32
