"""BlockMonitor, its sinks, and the ds_config key block_metrics: beside tensors read out whole."""

import csv
import math

import pytest
import torch
from deepspeed_door.engines import config, start
from measure.test_metrics import block_of
from ranks import pool
from twins import make, token_ids

from blockwise_lr import BlockError, BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, map_blocks
from blockwise_lr.measure import BlockMonitor, csv_sink, tensorboard_sink, wandb_sink


def norms(named):
    """Block type -> norm and root mean square of all its elements."""
    found = {}
    for name, value in named.items():
        found.setdefault(block_of(name), []).append(value.double().flatten())
    parts = {block: torch.cat(values) for block, values in found.items()}
    return {block: (float(v.norm()), float(v.square().mean().sqrt())) for block, v in parts.items()}


def checked(figures, gradients, before, after):
    """The worst relative difference from gradients and weights that were read out whole."""
    moved = norms({name: after[name] - before[name] for name in after})
    expected = {f"weight_rms/{block}": rms for block, (_, rms) in norms(after).items()}
    expected.update({f"update_rms/{block}": rms for block, (_, rms) in moved.items()})
    expected.update({f"gradient_norm/{block}": norm for block, (norm, _) in norms(gradients).items()})
    for block, (_, rms) in moved.items():
        expected[f"update_to_weight/{block}"] = rms / norms(after)[block][1]
    assert {name for name in figures if not name.startswith(("variance", "loss", "forward_time"))} == set(expected)
    found = {name: abs(figures[name] / value - 1) for name, value in expected.items()}
    worst = max(found, key=found.get)
    return found[worst], worst


@pytest.mark.parametrize("kind", [BlockwiseAdamW, BlockwiseAdamMini, BlockwiseLion])
def test_every_third_step_is_told(kind, tmp_path):
    model = make("llama")
    optimizer = kind(model.named_parameters(), lr=1e-3, weight_decay=0.1, block_map=map_blocks(model))
    seen = []
    monitor = BlockMonitor(
        optimizer,
        every=3,
        sinks=[lambda figures, step: seen.append((step, figures)), csv_sink(tmp_path / "a" / "m.csv")],
    )
    for step, batch in enumerate(token_ids(6, 1, 1), 1):
        ids = batch[0][0]
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        figures = monitor.report(loss.item())
        assert (figures is None) == (step % 3 > 0)
        if figures:
            gradients = {name: p.grad for name, p in model.named_parameters()}
            after = {name: p.detach() for name, p in model.named_parameters()}
            assert checked(figures, gradients, before, after)[0] < 1e-4
            assert figures["loss_ratio_max"] >= figures["loss_ratio"] > 0
    assert [step for step, _ in seen] == [3, 6]
    with open(tmp_path / "a" / "m.csv") as file:
        lines = list(csv.DictReader(file))
    assert {(int(line["step"]), line["name"]): float(line["value"]) for line in lines} == {
        (step, name): value for step, figures in seen for name, value in figures.items()
    }
    monitor.close()
    optimizer.step()
    assert monitor._sums == {} and len(seen) == 2


def test_training_is_the_same_to_the_bit_with_and_without():
    def weights(watched):
        model = make("llama")
        optimizer = BlockwiseAdamMini(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
        monitor = BlockMonitor(optimizer, every=2) if watched else None
        for batch in token_ids(4, 1, 1):
            optimizer.zero_grad()
            model(batch[0][0], labels=batch[0][0]).loss.backward()
            optimizer.step()
            if monitor:
                monitor.report()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(True), weights(False))


def test_a_resumed_monitor_reports_at_the_same_steps():
    model = make("llama")
    optimizer = BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model))
    first = BlockMonitor(optimizer, every=3)
    first.report(2.0)
    again = BlockMonitor(optimizer, every=3)
    again.load_state_dict(first.state_dict())
    assert again.report(3.0) is None and again.report(1.0)["loss_ratio_max"] == 1.5
    with pytest.raises(BlockError, match="every is 0; give a whole number of steps"):
        BlockMonitor(optimizer, every=0)


def test_sinks_hand_on_under_one_prefix(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard_sink(writer)({"weight_rms/qk": 0.5}, 7)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload().Scalars("blocks/weight_rms/qk")
    assert [(event.step, event.value) for event in events] == [(7, 0.5)]
    told = []

    class Run:  # what wandb.init returns has one method that is used here
        def log(self, values, step):
            told.append((values, step))

    wandb_sink(Run())({"weight_rms/qk": 0.5}, 7)
    assert told == [({"blocks/weight_rms/qk": 0.5}, 7)]


def with_key(kind, stage, folder):
    """What DeepSpeed's own CSV monitor wrote at step 2, and the worst difference from tensors that it serves whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    monitors = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    settings = config(kind, stage, block_metrics={"every": 2}, gradient_accumulation_steps=1, **monitors)
    settings["gradient_clipping"] = 1e6  # 1 where it is not said
    engine = start(make("llama"), settings)
    data = token_ids(2, 1, 2)
    read = lambda get: {n: get(p).detach().float().clone() for n, p in engine.module.named_parameters()}  # noqa: E731
    for batch in data:
        ids = batch[0][torch.distributed.get_rank()]
        engine.backward(engine(ids, labels=ids).loss)
        gradients, before = read(safe_get_full_grad), read(safe_get_full_fp32_param)
        engine.step()
    from blockwise_lr.deepspeed.metrics import figures_of

    figures = figures_of(engine)
    worst = checked(figures, gradients, before, read(safe_get_full_fp32_param))
    engine.destroy()
    return worst, figures


@pytest.mark.parametrize("kind, stage", [("BlockwiseAdamW", 1), ("BlockwiseAdamMini", 2), ("BlockwiseAdamW", 3)])
def test_a_ds_config_writes_them_to_deepspeeds_monitors(kind, stage, tmp_path):
    (worst, figures), (_, same) = pool(2).run(with_key, kind, stage, str(tmp_path))
    assert worst[0] < 1e-3 and figures == same, worst
    written = {}
    for file in (tmp_path / "run").glob("Train_Blocks_*.csv"):
        (line,) = list(csv.reader(file.open()))[1:]
        written[file.stem.removeprefix("Train_Blocks_")] = float(line[1])
        assert int(line[0]) == 8  # samples: two steps of two rows on two ranks
    assert written.keys() == {name.replace("/", "_") for name in figures}
    assert all(math.isclose(written[name.replace("/", "_")], value, rel_tol=1e-6) for name, value in figures.items())


def refused(settings, other=None):
    top = dict(settings)
    if other is not None and torch.distributed.get_rank() == 1:
        top.update(other)
    made = config("BlockwiseAdamW", 1, **top)
    if top.pop("plain", False):
        made.pop("plain")
        made["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        made.pop("scheduler")
    start(make("llama"), made)


MONITOR = {"csv_monitor": {"enabled": True, "output_path": "unused", "job_name": "run"}}


@pytest.mark.parametrize(
    "settings, other, words",
    [
        ({"block_metrics": {"every": 2}}, None, "the ds_config enables none; add one"),
        ({"block_metrics": {"every": 0}, **MONITOR}, None, "every is 0"),
        ({"block_metrics": {"evry": 2}, **MONITOR}, None, "did you mean 'every'"),
        ({"block_metrics": 2, **MONITOR}, None, "block_metrics is 2; write"),
        ({"block_metric": {}, **MONITOR}, None, "did you mean 'block_metrics'"),
        ({"block_metrics": {}, "plain": True, **MONITOR}, None, "needs a blockwise optimizer"),
        ({**MONITOR}, {"block_metrics": {}}, "block_metrics of the ds_config is another on rank 1"),
    ],
)
def test_bad_settings_are_refused_on_every_rank(settings, other, words, tmp_path, monkeypatch):
    errors = pool(2).run(refused, settings, other, errors=True)
    assert all(isinstance(error, BlockError) and words in str(error) for error in errors), errors
