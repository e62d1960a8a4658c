"""deepspeed.utils' functions that get and set optimizer states, parameter by parameter."""

import pytest
import torch
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from references import once
from twins import RATIOS, Twin, make

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
LAYOUTS = [
    (1, {}),
    (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    (3, {}),
    (1, {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}),
]


@once
def loop_moments(steps, ranks, kind="llama"):
    """Both moments of every parameter after some steps of the plain loop, second moments spread over elements."""
    from deepspeed_door.engines import ACCUMULATION, BETAS, CLIP, DECAY, EPS, LR, MIN_LR, WARMUP
    from twins import LoopAdamMini, paper_lr, token_ids

    twin = Twin(kind, make(kind))
    optimizer = LoopAdamMini(twin, BETAS, EPS, DECAY, RATIOS)
    for number, batch in enumerate(token_ids(steps, ACCUMULATION, ranks), 1):
        for part in batch:
            for ids in part:
                twin.backward(ids, 1 / (ACCUMULATION * ranks))
        twin.clip(CLIP)
        optimizer.step(lambda ratio: paper_lr(number, ratio, LR, MIN_LR, WARMUP, 4))
    found = {}
    for name, (first, second) in optimizer.moments.items():
        shape = twin.leaves[name].tensor.shape
        spread = torch.stack(second).repeat_interleave(first.numel() // len(second))
        found[name] = (first.view(shape), spread.view(shape))
    return found


def states_of(engine):
    from deepspeed.utils import safe_get_full_optimizer_state

    return {
        name: tuple(safe_get_full_optimizer_state(p, key).clone() for key in ("exp_avg", "exp_avg_sq"))
        for name, p in engine.module.named_parameters()
    }


def got(stage, options):
    """The worst difference of a state from the loop's, before the first step (from 0) and after two."""
    import torch.distributed as dist

    engine = start(make("llama"), config(MINI, stage, steps=4, **options))
    before = max(float(value.abs().max()) for pair in states_of(engine).values() for value in pair)
    train(engine, 2)
    found = states_of(engine)
    engine.destroy()
    wanted = loop_moments(2, dist.get_world_size())
    assert found.keys() == wanted.keys() and all(f.shape == w.shape for n in found for f, w in zip(found[n], wanted[n]))
    return before, max(float((f - w).norm() / w.norm()) for n in found for f, w in zip(found[n], wanted[n]))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage, options", LAYOUTS)
def test_getting_a_state_gives_the_plain_loops(stage, options, ranks):
    bound = 0.2 if "dtype" in options else 1e-5
    for before, worst in pool(ranks).run(got, stage, options):
        assert before == 0 and worst < bound


def set_and_refused(kind, stage, options):
    """Sets other states on every parameter, reads them back and trains on; then a value that no segment has."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    torch.manual_seed(3)
    engine = start(make("llama"), config(kind, stage, steps=4, **options))
    train(engine, 1)
    same = True
    for p in engine.module.parameters():
        second = 2 * safe_get_full_optimizer_state(p, "exp_avg_sq") + 1e-4
        first = torch.rand_like(second)
        for key, value in (("exp_avg", first), ("exp_avg_sq", second)):
            safe_set_full_optimizer_state(p, value, key)
            same = same and torch.equal(safe_get_full_optimizer_state(p, key), value)
    before = states_of(engine)
    texts = []
    p = dict(engine.module.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    uneven = torch.rand(p.ds_shape if hasattr(p, "ds_shape") else p.shape)
    for key, value in (("exp_avg_sq", uneven), ("exp_avg", uneven[:-1]), ("momentum_buffer", uneven)):
        try:
            safe_set_full_optimizer_state(p, value, key)
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    after = states_of(engine)
    if kind == MINI:
        same = same and all(torch.equal(a, b) for n in after for a, b in zip(after[n], before[n]))
    train(engine, 1, first=1)
    finite = all(bool(value.isfinite().all()) for value in weights(engine).values())
    engine.destroy()
    return same, finite, texts


@pytest.mark.parametrize(
    "kind, stage, options", [*((MINI, *layout) for layout in LAYOUTS), (ADAMW, 3, {}), (ADAMW, 2, {})]
)
def test_setting_a_state_is_exact_or_refused_on_every_rank(kind, stage, options):
    answers = pool(2).run(set_and_refused, kind, stage, options)
    assert answers[0] == answers[1]
    same, finite, texts = answers[0]
    assert same and finite
    wanted = ["exp_avg_sq of model.layers.0.mlp.up_proj.weight was given values that differ within a segment"]
    for text, words in zip(
        texts, (wanted if kind == MINI else []) + ["elements and has", "no state 'momentum_buffer'"]
    ):
        assert words in text
    assert len(texts) == (3 if kind == MINI else 2)


def local_forms():
    """ZeRO-3's local forms: what they get is this rank's part of the full state, and can be set again."""
    import torch.distributed as dist
    from deepspeed.utils import (
        safe_get_full_optimizer_state,
        safe_get_local_optimizer_state,
        safe_set_local_optimizer_state,
    )

    engine = start(make("gpt2"), config(MINI, 3, steps=4))
    train(engine, 1)
    right = True
    for p in engine.module.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            full, local = safe_get_full_optimizer_state(p, key), safe_get_local_optimizer_state(p, key)
            padded = torch.zeros(local.numel() * dist.get_world_size())
            padded[: full.numel()] = full.flatten()
            right = right and torch.equal(local, padded.chunk(dist.get_world_size())[dist.get_rank()])
            safe_set_local_optimizer_state(p, 3 * local, key)
            right = right and torch.equal(safe_get_full_optimizer_state(p, key), 3 * full)
    engine.destroy()
    return right


def test_local_forms_are_parts_of_the_full_state():
    assert pool(2).run(local_forms) == [True, True]


def gradients(kind, stage):
    """Full gradients as DeepSpeed hands them out, doubled in place; Adam's first step does not see the scale."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad
    from twins import token_ids

    engine = start(make("llama"), config(kind, stage, optimizer={"eps": 1e-20}, gradient_accumulation_steps=1))
    ids = token_ids(1, 1, 2)[0, 0, 0]
    engine.backward(engine(ids, labels=ids).loss)
    for p in engine.module.parameters():
        safe_set_full_grad(p, 2 * safe_get_full_grad(p))
    engine.step()
    found = states_of(engine)["model.norm.weight"]
    engine.destroy()
    return [float(value.norm()) for value in found]


def test_gradients_can_be_got_and_set():
    for stage in (1, 3):
        adamw, mini = pool(2).run(gradients, ADAMW, stage)[0], pool(2).run(gradients, MINI, stage)[0]
        assert adamw[0] == pytest.approx(mini[0], rel=1e-6) and mini[0] > 0
