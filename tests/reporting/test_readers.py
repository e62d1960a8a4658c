"""What runs have written, read back: by real writers, compared with what they were given."""

import csv
import json
import logging
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train
from ranks import pool
from twins import make

from blockwise_lr.measure import csv_sink, tensorboard_sink
from blockwise_lr.reporting import find_runs
from blockwise_lr.reporting.names import known_name

HERE = Path(__file__).parent
FIGURES = {"update_rms/qk": 0.25, "sharpness/norm": 3e-6, "loss_ratio": 1.5}


def points(run, name):
    series = run.series[name]
    return dict(zip(series.steps.tolist(), series.values.tolist()))


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("lm loss", "loss"),
        ("Train/Samples/train_loss", "loss"),
        ("train/loss", "loss"),
        ("lm loss validation", "validation_loss"),
        ("eval_loss", "validation_loss"),
        ("Train/Samples/lr", "learning-rate"),
        ("learning_rate", "learning-rate"),
        ("Train/Samples/lr_qk", "learning-rate/qk"),
        ("Train/Samples/lr_vision", "learning-rate/vision"),
        ("learning-rate/ffn", "learning-rate/ffn"),
        ("Train/Blocks/variance_max/vo", "blocks/variance_max/vo"),
        ("sharpness_error/qk", "blocks/sharpness_error/qk"),
        ("train/blocks/loss_ratio_max", "blocks/loss_ratio_max"),
        ("lr_scheduler_steps", "lr_scheduler_steps"),
        ("load_balancing_loss", "load_balancing_loss"),
    ],
)
def test_a_figure_has_one_name_whatever_wrote_it(raw, name):
    assert known_name(raw) == name


def test_our_sinks_and_tensorboard_are_one_run_of_their_folder(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20):
            writer.add_scalar("lm loss", 4 - step / 10, step, walltime=1000 + 3 * step)
            writer.add_scalar("lm loss vs samples", 9.0, 16 * step)
            writer.add_scalar("lm loss validation", 5 - step / 10, step, walltime=1000 + 3 * step)
            tensorboard_sink(writer)(FIGURES, step)
        writer.add_scalar("lm loss validation", 9.0, 20)  # Megatron's last evaluation, on other batches
        writer.add_text("seed", "7")
    csv_sink(tmp_path / "later.csv")({"update_rms/vo": 0.5}, 20)
    (run,) = find_runs(str(tmp_path))
    assert points(run, "loss") == {10: 3, 20: 2} and points(run, "validation_loss") == {10: 4, 20: 3}
    assert run.series["loss"].seconds.tolist() == [0, 30] and run.seed == "7" and run.unit == "steps"
    assert points(run, "blocks/update_rms/vo") == {20: 0.5} and "lm loss vs samples" not in run.series
    for name, value in FIGURES.items():
        assert points(run, f"blocks/{name}") == pytest.approx({10: value, 20: value})
    assert len(run.files) == 2


def logged(folder):
    """Four steps under DeepSpeed with its CSV monitor and log; the losses, and the rates that it had."""
    import deepspeed

    import blockwise_lr.deepspeed

    monitor = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    settings = config("BlockwiseAdamW", 2, steps=4, csv_monitor=monitor, block_metrics={"every": 2}, steps_per_print=1)
    handler = logging.FileHandler(folder / f"rank{dist.get_rank()}.log")
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s")
    )
    deepspeed.utils.logger.addHandler(handler)
    engine = start(make("llama"), settings)
    deepspeed.utils.logger.setLevel(logging.INFO)
    rates = []
    for step in range(4):
        train(engine, 1, step)
        rates.append(blockwise_lr.deepspeed.block_lrs(engine)[0]["qk"])
    figures = blockwise_lr.deepspeed.metrics.figures_of(engine)
    deepspeed.utils.logger.removeHandler(handler)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    engine.destroy()
    return rates, figures


def test_deepspeeds_monitor_and_log_are_counted_in_steps(tmp_path):
    rates, figures = pool(2).run(logged, tmp_path)[0]
    (run,) = find_runs(str(tmp_path / "job"))
    assert run.unit == "steps" and run.facts["settings"]["samples of a batch"] == "8"
    assert points(run, "learning-rate/qk") == pytest.approx(dict(zip((1, 2, 3, 4), rates)))
    assert {name.removeprefix("blocks/") for name in run.series if name.startswith("blocks/")} == set(figures)
    for name, value in figures.items():
        assert run.series[f"blocks/{name}"].steps.tolist() == [2, 4]
        assert run.series[f"blocks/{name}"].final == pytest.approx(value)
    (log,) = find_runs(str(tmp_path / "rank0.log"))
    base = points(log, "learning-rate")
    assert base == pytest.approx(points(run, "learning-rate")) and base[1] == pytest.approx(rates[0] / 8)
    assert all(value > 0 for value in points(log, "samples_per_second").values())
    assert log.series["learning-rate"].seconds[0] == 0


def test_a_restarted_monitor_writes_its_head_again(tmp_path):
    (tmp_path / "Train_Samples_lr.csv").write_text("step,lr\n8,0.1\n16,0.2\nstep,lr\n24,0.3\n")
    (tmp_path / "Train_Samples_train_loss.csv").write_text(
        "step,train_loss\n8,4\n16,3\nstep,train_loss\n16,3.5\n24,2\n"
    )
    (run,) = find_runs(str(tmp_path))
    assert points(run, "loss") == {1: 4, 2: 3.5, 3: 2}


def test_a_real_log_of_megatron():
    """A run of examples/megatron, cut to some of its lines."""
    (run,) = find_runs(str(HERE / "megatron.log"))
    text = (HERE / "megatron.log").read_text()
    losses = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", text)
    assert points(run, "loss") == {int(step): float(loss) for step, loss in losses} and len(losses) >= 4
    held_out = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", text)
    assert points(run, "validation_loss") == {int(step): float(loss) for step, loss in held_out} and held_out
    assert points(run, "learning-rate/embedding")[10] == pytest.approx(10 * points(run, "learning-rate/norm")[10])
    assert points(run, "blocks/update_to_weight/ffn").keys() == {20, 40}
    assert run.facts["settings"]["block_lr_ratios"].startswith("{'embedding': 10") and run.seed == "1234"
    assert points(run, "seconds_per_step")[20] == pytest.approx(0.5, abs=0.2)
    assert run.series["loss"].seconds[-1] > 10


def test_a_trainers_state_and_its_newest_checkpoint(tmp_path):
    from transformers import TrainerState

    history = [
        {"loss": 4.0, "grad_norm": 1.5, "learning_rate": 1e-3, "epoch": 0.1, "step": 10},
        {"eval_loss": 4.2, "eval_runtime": 1.0, "epoch": 0.1, "step": 10},
        {"blocks/weight_rms/qk": 0.02, "sharpness/qk": 1e-6, "epoch": 0.1, "step": 10},
        {"loss": 3.0, "grad_norm": 1.2, "learning_rate": 5e-4, "epoch": 0.2, "step": 20},
        {"train_runtime": 12.5, "train_samples_per_second": 8.0, "train_loss": 3.5, "epoch": 0.2, "step": 20},
    ]
    for number in (10, 20):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        TrainerState(global_step=number, log_history=history[: 3 if number == 10 else 5]).save_to_json(
            str(folder / "trainer_state.json")
        )
    (run,) = find_runs(f"mine={tmp_path}")
    assert run.name == "mine" and points(run, "loss") == {10: 4, 20: 3} and points(run, "validation_loss") == {10: 4.2}
    assert points(run, "blocks/weight_rms/qk") == {10: 0.02} and points(run, "blocks/sharpness/qk") == {10: 1e-6}
    assert run.seconds == 12.5 and run.seconds_at("loss", 10) == 6.25


def test_tables_and_exports_of_weights_and_biases(tmp_path):
    (tmp_path / "loss.csv").write_text("iteration,train_loss,val_loss,seconds\n1,4,,2\n2,3,3.5,4\n")
    (tmp_path / "wandb.csv").write_text(
        '"Step","a - train/loss","a - train/loss__MIN","b - train/loss"\n1,4,4,5\n2,3,3,\n3,,,2\n'
    )
    (tmp_path / "other.csv").write_text("name,value\nx,1\n")
    table, a, b = find_runs(str(tmp_path))
    assert points(table, "loss") == {1: 4, 2: 3} and points(table, "validation_loss") == {2: 3.5}
    assert points(a, "loss") == {1: 4, 2: 3} and points(b, "loss") == {1: 5, 3: 2}
    assert table.seconds_at("loss", 2) == 2


def test_what_scripts_print_and_what_lies_beside(tmp_path):
    (tmp_path / "out.log").write_text(
        "start\nstep 10 loss 3.5 lr 1e-3\n\x1b[32mstep 10 validation loss: 3.75\x1b[0m\nstep 20 loss 3.25\n"
        "[2026-01-01 00:00:00,000] [INFO] steps: 30 loss: 3.0000 iter time (s): 0.5 samples/sec: 16.0\n"
        "[2026-01-01 00:00:00,000] [INFO] [logging.py:1:log] DeepSpeed info: version=0.19.8, git-hash=x\n"
    )
    ds_config = {"optimizer": {"type": "BlockwiseAdamW", "params": {"lr": 3e-4, "block_lr_ratios": {"qk": 8}}}}
    (tmp_path / "ds_config.json").write_text(json.dumps(ds_config))
    (run,) = find_runs(str(tmp_path))
    assert points(run, "loss") == {10: 3.5, 20: 3.25, 30: 3} and points(run, "validation_loss") == {10: 3.75}
    assert points(run, "samples_per_second") == {30: 16} and run.facts["versions"] == {"deepspeed": "0.19.8"}
    assert run.facts["settings"]["optimizer.params.block_lr_ratios.qk"] == "8"


def test_a_block_map_that_inspect_has_written(tmp_path):
    from typer.testing import CliRunner

    from blockwise_lr.cli import app

    target = "configs/models/llama-0.25b.json"
    CliRunner().invoke(app, ["inspect", target, "--format", "json", "--output", str(tmp_path / "blocks.json")])
    csv_sink(tmp_path / "m.csv")({"weight_rms/qk": 1.0}, 1)
    (run,) = find_runs(str(tmp_path))
    assert run.facts["blocks"]["qk"].endswith("ratio 1, peak lr 0.001") and run.facts["blocks"]["head"].endswith(
        "ratio 10, peak lr 0.01"
    )


def test_each_log_of_a_folder_is_a_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.log").write_text("step 1 loss 3\nstep 2 loss 2\n")
    (tmp_path / "notes.txt").write_text("nothing of it\n")
    assert [Path(run.name).name for run in find_runs(str(tmp_path))] == ["a", "b"]


def test_values_are_those_of_the_file(tmp_path):
    """Every number of a sink's file is on a series, as it was."""
    values = torch.randn(40, dtype=torch.float64).tolist()
    sink = csv_sink(tmp_path / "m.csv")
    for step, value in enumerate(values, 1):
        sink({"gradient_norm/qk": value}, step)
    (run,) = find_runs(str(tmp_path / "m.csv"))
    with (tmp_path / "m.csv").open() as lines:
        assert [float(row["value"]) for row in csv.DictReader(lines)] == run.series[
            "blocks/gradient_norm/qk"
        ].values.tolist()
