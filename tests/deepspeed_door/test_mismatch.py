"""A checkpoint that contradicts the run is refused on every rank alike, with what differs and what to pass; other
optimizers' states continue on request."""

import logging

import pytest
import torch
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
TOTAL = 10


def saved(kind, stage, folder, optimizer=None, model="llama"):
    """A checkpoint after three updates; returns the state of each flat tensor on this rank."""
    engine = start(make(model), config(kind, stage, steps=TOTAL, optimizer=optimizer))
    train(engine, 3)
    engine.save_checkpoint(folder, tag="three")
    found = states(engine)
    engine.destroy()
    return found


def states(engine):
    return [
        {key: value.clone() for key, value in engine.basic_optimizer.state[tensor].items()}
        for tensor, _ in engine.basic_optimizer.shards.flats
    ]


def refusal(kind, stage, folder, optimizer=None, model="llama", seed=5):
    """The error of loading (None without one), and whether the weights are as before."""
    engine = start(make(model, seed=seed), config(kind, stage, steps=TOTAL, optimizer=optimizer))
    before = weights(engine)
    try:
        engine.load_checkpoint(folder)
        message = None
    except ValueError as error:
        message = f"{type(error).__name__}: {error}"
    after = weights(engine)
    engine.destroy()
    return message, all(torch.equal(before[name], after[name]) for name in before)


CHANGES = {
    "block_lr_ratios": (
        {"block_lr_ratios": {"preset": "paper", "qk": 4, "embedding": 9}},
        ["block_lr_ratios: embedding 10.0 -> 9.0", "qk 8.0 -> 4.0"],
    ),
    "block_map": (
        {"block_rules": [{"match": "*.mlp.up_proj.*", "block": "vo"}]},
        ["block_map: model.layers.0.mlp.up_proj.weight ffn -> vo, model.layers.1.mlp.up_proj.weight"],
    ),
    "weight_decay": ({"weight_decay": 0.3}, ["weight_decay: 0.1 -> 0.3"]),
    "betas": ({"betas": [0.9, 0.99]}, ["betas: [0.9, 0.95] -> [0.9, 0.99]"]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("adamw"))
    return folder, pool(2).run(saved, ADAMW, 2, folder)


@pytest.mark.parametrize("key", CHANGES)
def test_changed_settings_are_refused_and_can_be_accepted(key, checkpoint):
    change, words = CHANGES[key]
    answers = pool(2).run(refusal, ADAMW, 2, checkpoint[0], change)
    assert answers[0] == answers[1]
    message, untouched = answers[0]
    assert untouched
    for word in ["MismatchError", *words, f'"accept_mismatch": ["{key}"]']:
        assert word in message
    assert pool(2).run(refusal, ADAMW, 2, checkpoint[0], {**change, "accept_mismatch": [key]})[0][0] is None


def test_another_model_is_refused_for_good(checkpoint):
    answers = pool(2).run(refusal, ADAMW, 2, checkpoint[0], {"accept_mismatch": ["block_map"]}, "gpt2")
    assert answers[0] == answers[1]
    assert "only in the checkpoint: lm_head.weight" in answers[0][0]
    assert "only in the model: transformer.h.0.attn.c_attn" in answers[0][0]
    assert "load the weights alone" in answers[0][0] and "accept_mismatch" not in answers[0][0]


def continued(kind, stage, folder, optimizer, model="llama"):
    """Loads; returns the states right after and the learning rates and log lines of two updates."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("blockwise_lr").addHandler(handler)
    settings = config(kind, stage, steps=TOTAL, optimizer=optimizer)
    del settings["scheduler"]
    engine = start(make(model, seed=5), settings)
    engine.load_checkpoint(folder)
    found = states(engine)
    rates = []
    for number in range(3, 6):
        train(engine, 1, first=number)
        rates.append(engine.basic_optimizer.block_lrs()[0]["qk"] / engine.basic_optimizer.param_groups[0]["lr"])
    engine.destroy()
    logging.getLogger("blockwise_lr").removeHandler(handler)
    return found, rates, lines


def segment_shape(name, p):
    """Of a llama parameter: (segments, elements of each)."""
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    return (1, -1) if "norm" in name else (heads, -1) if heads else (p.shape[0], -1)


def reference_means(model, states_of_ranks, stage):
    """Adam-mini's second moments from AdamW's, whole: per parameter, its segments' means, by plain reshaping."""
    elements = torch.cat([state[0]["exp_avg_sq"] for state in states_of_ranks])
    means, offset = {}, 0
    for name, p in model.named_parameters():
        value = elements[offset : offset + p.numel()].view(p.shape).double()
        offset += p.numel()
        means[name] = value.reshape(segment_shape(name, p)).mean(1)
    return torch.cat(list(means.values())).float()


def test_adamw_continues_as_adam_mini_with_averaged_segments(checkpoint):
    folder, before = checkpoint
    answers = pool(2).run(continued, MINI, 2, folder, {"accept_mismatch": ["optimizer"]})
    wanted = reference_means(make("llama"), before, 2)
    first, second = (answer[0][0]["exp_avg_sq"] for answer in answers)
    overlap = len(first) + len(second) - len(wanted)  # segments that the edge between the shards cuts are on both
    assert overlap in (0, 1)
    assert torch.allclose(torch.cat([first, second[overlap:]]), wanted, rtol=1e-6, atol=0)
    for (found, _, _), old in zip(answers, before):
        assert torch.equal(found[0]["exp_avg"], old[0]["exp_avg"]) and float(found[0]["step"]) == 3
    assert any("optimizer: BlockwiseAdamW -> BlockwiseAdamMini" in line for line in answers[0][2])
    assert any("averaged over each segment" in line for line in answers[0][2])


def test_adam_mini_continues_as_adamw_with_expanded_segments(tmp_path):
    before = pool(2).run(saved, MINI, 1, str(tmp_path))
    message = pool(2).run(refusal, ADAMW, 1, str(tmp_path))[1][0]
    assert "optimizer: BlockwiseAdamMini -> BlockwiseAdamW" in message and '["optimizer"]' in message
    answers = pool(2).run(continued, ADAMW, 1, str(tmp_path), {"accept_mismatch": ["optimizer"]})
    model, found = make("llama"), [states for states, _, _ in answers]
    means = reference_means(model, found, 1)
    first, second = (old[0]["exp_avg_sq"] for old in before)
    overlap = len(first) + len(second) - len(means)  # as above
    assert overlap in (0, 1)
    assert torch.allclose(torch.cat([first, second[overlap:]]), means, rtol=1e-6, atol=0)
    elements, begin = torch.cat([states[0]["exp_avg_sq"] for states in found]), 0
    for name, p in model.named_parameters():
        rows, begin = elements[begin : begin + p.numel()].reshape(segment_shape(name, p)), begin + p.numel()
        assert torch.equal(rows, rows[:, :1].expand_as(rows)), name
    assert any("every element getting its segment's exp_avg_sq" in line for line in answers[0][2])


def loaded_and_saved(kind, stage, folder):
    """Loads a universal checkpoint of another optimizer and saves what came of it."""
    engine = start(
        make("llama", seed=5),
        config(
            kind, stage, steps=TOTAL, checkpoint={"load_universal": True}, optimizer={"accept_mismatch": ["optimizer"]}
        ),
    )
    engine.load_checkpoint(folder, tag="universal", load_lr_scheduler_states=False)
    engine.save_checkpoint(folder, tag="again")
    engine.destroy()


@pytest.mark.parametrize("source, target", [(ADAMW, MINI), ("AdamW", MINI), (MINI, ADAMW)])
def test_another_optimizer_continues_at_another_layout(source, target, tmp_path):
    from blockwise_lr.deepspeed.universal import UniversalFolder, convert

    if source == "AdamW":
        pool(2).run(plain_adamw, str(tmp_path), 1)
    else:
        pool(2).run(saved, source, 1, str(tmp_path))
    convert(str(tmp_path / "three"), str(tmp_path / "universal"))
    pool(3).run(loaded_and_saved, target, 3, str(tmp_path))
    convert(str(tmp_path / "again"), str(tmp_path / "universal again"))
    for name, p in make("llama").named_parameters():
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            before, after = (
                UniversalFolder(str(tmp_path / folder)).values(name, key, p.numel())
                for folder in ("universal", "universal again")
            )
            if key == "exp_avg_sq" and target == MINI:
                rows = before.double().reshape(segment_shape(name, p))
                wanted = rows.mean(1, keepdim=True).expand_as(rows).reshape(-1).float()
                assert torch.allclose(after, wanted, rtol=1e-6, atol=0)
            else:
                assert torch.equal(after, before)


def plain_adamw(folder, stage):
    """A checkpoint of torch's AdamW, saved without blockwise_lr."""
    settings = config("AdamW", stage, steps=TOTAL)
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    engine = start(make("llama"), settings)
    train(engine, 3)
    engine.save_checkpoint(folder, tag="three")
    tensors = [group["params"][0] for group in engine.basic_optimizer.param_groups]
    found = [
        {key: engine.basic_optimizer.state[tensor][key].clone() for key in ("exp_avg", "exp_avg_sq")}
        for tensor in tensors
    ]
    engine.destroy()
    return found


@pytest.mark.parametrize("fade, wanted", [(0, [8.0, 8.0, 8.0]), (2, [4.5, 8.0, 8.0])])
def test_a_plain_adamw_checkpoint_continues_with_ratios_faded_in(fade, wanted, tmp_path):
    before = pool(2).run(plain_adamw, str(tmp_path), 1)
    message = pool(2).run(refusal, ADAMW, 1, str(tmp_path))[0][0]
    assert "one without a blockwise_lr record, taken for AdamW -> BlockwiseAdamW" in message
    answers = pool(2).run(
        continued, ADAMW, 1, str(tmp_path), {"accept_mismatch": ["optimizer"], "ratio_fade_steps": fade}
    )
    for (found, rates, _), old in zip(answers, before):
        assert torch.equal(found[0]["exp_avg_sq"], old[0]["exp_avg_sq"])
        assert torch.equal(found[0]["exp_avg"], old[0]["exp_avg"])
        assert rates == pytest.approx(wanted)
    assert any("fade" in line for line in answers[0][2]) == bool(fade)
    assert any("exp_avg and exp_avg_sq are kept" in line for line in answers[0][2])


def test_schedulers_of_schedulers_are_put_back_too():
    """As after a load that failed: the inner schedulers' counts, the rates and the engine's counters."""
    from types import SimpleNamespace

    from blockwise_lr.deepspeed.preconditions import counters_kept

    schedulers = torch.optim.lr_scheduler
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    scheduler = schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer), schedulers.ConstantLR(optimizer)], [2]
    )
    engine = SimpleNamespace(basic_optimizer=optimizer, optimizer=optimizer, lr_scheduler=scheduler, global_steps=3)
    before = str(scheduler.state_dict()), optimizer.param_groups[0]["lr"]
    with pytest.raises(ZeroDivisionError), counters_kept(engine):
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        engine.global_steps = 9
        assert str(scheduler.state_dict()) != before[0]
        raise ZeroDivisionError
    assert (str(scheduler.state_dict()), optimizer.param_groups[0]["lr"]) == before and engine.global_steps == 3
