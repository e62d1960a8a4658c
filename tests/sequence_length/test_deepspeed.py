"""Engines with "sequence_length_warmup" in the ds_config, beside engines without it on rows that were cut by hand."""

import math

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, weights
from deepspeed_door.test_parallel import VOCABULARY as PIPELINE_VOCABULARY
from deepspeed_door.test_parallel import WIDTH
from deepspeed_door.test_pipeline import BLOCKS, Expert, loss_of
from ranks import pool
from twins import VOCABULARY, make

KEY = "sequence_length_warmup"
FULL, STEPS, SAVE_AT = 32, 5, 2
WARMUP = {"start": 8, "end": FULL, "steps": 5, "multiple": 4}
LENGTHS = [12, 16, 20, 24, 32]


def settings(stage, **top):
    if top.pop("plain", False):
        made = config("BlockwiseAdamW", stage, **top)
        made["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        del made["scheduler"]
        return made
    return config("BlockwiseAdamW", stage, steps=STEPS, **top)


def batches(step, vocabulary=VOCABULARY):
    draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return [torch.randint(0, vocabulary, (2, FULL), generator=draw) for _ in range(2)]


def gradients(engine):
    from deepspeed.utils import safe_get_full_grad

    found = {
        name: p.grad if not engine.zero_optimization() else safe_get_full_grad(p)
        for name, p in engine.module.named_parameters()
    }
    return {name: grad.detach().clone() for name, grad in found.items()}


def train(engine, first, last, cut):
    """(losses, gradients and weights) of steps; rows are cut by hand to the steps' lengths, or whole."""
    found = []
    for step in range(first, last):
        for number, ids in enumerate(batches(step)):
            ids = ids[:, : LENGTHS[step]] if cut else ids
            mask = torch.ones_like(ids)
            loss = engine(ids, attention_mask=mask, labels=ids).loss
            engine.backward(loss)
            if number == 1:
                grads = gradients(engine)
            engine.step()
            found.append(float(loss.detach()))
        found.append((grads, weights(engine)))
    return found


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, float):
            assert mine == other
            continue
        for values, others in zip(mine, other):
            assert all(torch.equal(value, others[name]) for name, value in values.items())


def as_cut_by_hand(stage, plain, folder):
    engine = start(make("llama"), settings(stage, plain=plain))
    expected = train(engine, 0, STEPS, cut=True)
    engine.destroy()
    engine = start(make("llama"), settings(stage, plain=plain, **{KEY: WARMUP}))
    ours = train(engine, 0, SAVE_AT, cut=False)
    engine.save_checkpoint(folder, client_state={"mine": 1})
    engine.eval()
    assert engine(batches(0)[0]).logits.shape[1] == FULL
    engine.train()
    ours += train(engine, SAVE_AT, STEPS, cut=False)
    same(ours, expected)
    from blockwise_lr.deepspeed.sequence_length import length_of
    from blockwise_lr.sequence_length import warmup_of

    assert warmup_of(engine).tokens() == 2 * 2 * dist.get_world_size() * sum(LENGTHS) and length_of(engine) == FULL
    engine.destroy()
    engine = start(make("llama", seed=1), settings(stage, plain=plain, **{KEY: WARMUP}))
    loaded = engine.load_checkpoint(folder)[1]
    assert loaded["mine"] == 1 and KEY not in loaded
    same(train(engine, SAVE_AT, STEPS, cut=False), expected[3 * SAVE_AT :])
    assert warmup_of(engine).tokens() == 2 * 2 * dist.get_world_size() * sum(LENGTHS)
    engine.destroy()


@pytest.mark.parametrize("stage, plain", [(0, True), (1, False), (2, False), (3, False), (0, False), (3, True)])
def test_trains_and_resumes_as_on_rows_cut_by_hand(stage, plain, tmp_path):
    pool(2).run(as_cut_by_hand, stage, plain, str(tmp_path))


def decayed(folder):
    """(tokens before a step, its rate of norms) of steps, and of those after a load."""
    from blockwise_lr.deepspeed import block_lrs

    rule = {"type": "BlockwiseTokenCosine", "params": {"total_num_tokens": 900, "warmup_num_steps": 2, "min_lr": 1e-4}}
    engine = start(make("llama"), config("BlockwiseAdamW", 2, scheduler=rule, **{KEY: WARMUP}))
    scheduler, rates = engine.lr_scheduler, []
    for step in range(STEPS):
        rates.append((scheduler.num_tokens, block_lrs(engine)[0]["norm"]))
        train(engine, step, step + 1, cut=False)
        if step == 2:
            engine.save_checkpoint(folder)
    assert scheduler.finished == (scheduler.num_tokens >= 900)
    engine.destroy()
    again = start(make("llama"), config("BlockwiseAdamW", 2, scheduler=rule, **{KEY: WARMUP}))
    again.load_checkpoint(folder)
    for step in range(3, STEPS):
        assert rates[step] == (again.lr_scheduler.num_tokens, block_lrs(again)[0]["norm"])
        train(again, step, step + 1, cut=False)
    again.destroy()
    return rates


def test_the_rate_decays_by_tokens_of_all_ranks(tmp_path):
    first, second = pool(2).run(decayed, str(tmp_path))
    tokens = [2 * 2 * 2 * sum(LENGTHS[:step]) for step in range(STEPS)]
    left = [min((count - tokens[2]) / (900 - tokens[2]), 1) for count in tokens]
    expected = [1e-3, 2e-3, *(1e-4 + 1.9e-3 * 0.5 * (1 + math.cos(math.pi * part)) for part in left[2:])]
    assert first == second and [count for count, _ in first] == tokens
    assert [rate for _, rate in first] == pytest.approx(expected, rel=1e-12)


def pipeline(top):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.utils import groups

    groups.mpu = groups.mesh_device = None
    deepspeed.init_distributed("gloo")
    module = PipelineModule(
        [
            LayerSpec(torch.nn.Embedding, PIPELINE_VOCABULARY, WIDTH),
            LayerSpec(Expert),
            LayerSpec(torch.nn.LayerNorm, WIDTH),
            LayerSpec(torch.nn.Linear, WIDTH, PIPELINE_VOCABULARY, bias=False),
        ],
        num_stages=2,
        loss_fn=loss_of,
        partition_method="uniform",
    )
    for name, p in module.named_parameters():
        torch.manual_seed(sum(map(ord, name)))
        torch.nn.init.normal_(p, 0, 0.2)
    numbers = {"0.": "embed_tokens", "1.": "mlp", "2.": "norm", "3.": "lm_head"}
    rules = [{"match": f"{number}*", "block": BLOCKS[part]} for number, part in numbers.items()]
    made = settings(1, optimizer={"block_rules": rules}, **top)
    return start(module, made)


def train_pipeline(engine, first, last, cut):
    found = []
    for step in range(first, last):
        draw = torch.Generator().manual_seed(10 * step + engine.grid.get_data_parallel_rank())
        data = [torch.randint(0, PIPELINE_VOCABULARY, (2, FULL), generator=draw) for _ in range(2)]
        data = [ids[:, : LENGTHS[step]] for ids in data] if cut else data
        found.append(float(engine.train_batch(iter([(ids, ids) for ids in data]))))
        whole = [torch.zeros(2, FULL, dtype=torch.long)] * 2
        found.append(float(engine.eval_batch(iter([(ids, ids) for ids in whole]))))
        found.append({name: p.detach().clone() for name, p in engine.module.named_parameters()})
    return found


class Fresh:
    """Shapes agreed on anew for every batch, as it must be where rows are cut by hand."""

    def __init__(self, engine):
        train_batch, eval_batch = engine.train_batch, engine.eval_batch
        engine.train_batch = lambda data: (engine.reset_activation_shape(), train_batch(data))[1]
        engine.eval_batch = lambda data: (engine.reset_activation_shape(), eval_batch(data))[1]


def in_a_pipeline(folder):
    from blockwise_lr.sequence_length import warmup_of

    engine = pipeline({})
    Fresh(engine)
    expected = train_pipeline(engine, 0, STEPS, cut=True)
    engine.destroy()
    engine = pipeline({KEY: WARMUP})
    ours = train_pipeline(engine, 0, SAVE_AT, cut=False)
    engine.save_checkpoint(folder)
    ours += train_pipeline(engine, SAVE_AT, STEPS, cut=False)
    assert warmup_of(engine).tokens() == 2 * 2 * 2 * sum(LENGTHS)
    engine.destroy()
    engine = pipeline({KEY: WARMUP})
    for p in engine.module.parameters():
        p.data.add_(0.1)
    assert engine.load_checkpoint(folder)[0] is not None
    resumed = train_pipeline(engine, SAVE_AT, STEPS, cut=False)
    assert warmup_of(engine).tokens() == 2 * 2 * 2 * sum(LENGTHS)
    engine.destroy()
    for mine, other in [*zip(ours, expected, strict=True), *zip(resumed, expected[3 * SAVE_AT :], strict=True)]:
        assert mine == other if isinstance(mine, float) else all(torch.equal(mine[name], other[name]) for name in other)


def test_a_pipeline_trains_and_resumes_as_on_rows_cut_by_hand(tmp_path):
    """Two stages of two data-parallel ranks, evaluated at full length after every step."""
    pool(4).run(in_a_pipeline, str(tmp_path))


def reshaped(stage):
    engine = start(make("llama"), settings(stage, **{KEY: {**WARMUP, "way": "reshape", "multiple": 8}}))
    from blockwise_lr.sequence_length import warmup_of

    shapes = set()
    engine.module.register_forward_pre_hook(lambda _, args, kwargs: shapes.add(tuple(args[0].shape)), with_kwargs=True)
    losses = [found for found in train(engine, 0, 5, cut=False) if isinstance(found, float)]
    assert shapes == {(8, 8), (4, 16), (4, 24), (2, 32)} and warmup_of(engine).tokens() == 2 * 2 * 2 * FULL * 5
    engine.destroy()
    return losses


def test_reshaping_trains_on_every_token():
    first, second = pool(2).run(reshaped, 2)
    assert len(first) == 10 and first != second


def wrong(change, odd=None):
    if odd is not None and dist.get_rank() != odd:
        change = {KEY: WARMUP}
    start(make("llama"), settings(1, **change))


@pytest.mark.parametrize(
    "change, odd, words",
    [
        (
            {KEY: {**WARMUP, "strat": 8}},
            None,
            "sequence_length_warmup: unknown parameter 'strat' (did you mean 'start'?)",
        ),
        (
            {KEY: {**WARMUP, "steps": 0}},
            1,
            "sequence_length_warmup: steps is 0; give a whole number of optimizer steps",
        ),
        (
            {KEY: {**WARMUP, "steps": 6}},
            1,
            "sequence_length_warmup of the ds_config is another on rank 1 than on rank 0",
        ),
        ({}, 1, "is another on rank 1 than on rank 0"),
        ({KEY: 64}, None, 'sequence_length_warmup is 64; write {"start": 64'),
        (
            {"sequence_length_warmups": WARMUP},
            None,
            "'sequence_length_warmups'; did you mean 'sequence_length_warmup'?",
        ),
    ],
)
def test_bad_settings_stop_every_rank_with_one_sentence(change, odd, words):
    errors = pool(2).run(wrong, change, odd, errors=True)
    assert len({str(error) for error in errors}) == 1 and words in str(errors[0])
