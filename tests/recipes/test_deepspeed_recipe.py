"""A few real steps of the DeepSpeed recipe: two gloo ranks, stand-in data, the models made small."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ranks import pool
from recipes.stand_in import ARMS, RECIPES, prepared, shrunk

OPTIONS = (
    "--batch 12 --micro-batch 3 --steps 12 --log-interval 2 --eval-interval 6 --eval-sequences 24 --save-interval 6"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("recipes") / "data", "--no-index")


def words(arm, model, data, out, *more):
    files = ["--model", str(shrunk(model, data)), "--data", str(data), "--out", str(out)]
    return ["--arm", arm, *files, *OPTIONS.split(), *more]


def run(arguments):
    """The script's main() on this rank: the rates that its last step left, or what it ended with."""
    import train_deepspeed

    import blockwise_lr.deepspeed

    try:
        engine = train_deepspeed.main(arguments)
    except SystemExit as end:
        return str(end)
    rates = engine.get_lr() if "adamw" in arguments else blockwise_lr.deepspeed.block_lrs(engine)[0].values()
    engine.destroy()
    return {round(rate, 9) for rate in rates}


def curve(out, *keys):
    lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    return [
        tuple(line.get(key) for key in keys or ("step", "tokens", "loss", "validation_loss", "lr")) for line in lines
    ]


@pytest.mark.full  # the parts run below in ranks that are there already
def test_it_trains_under_torchrun_and_goes_on_to_the_bit(data, tmp_path):
    """The newest checkpoint is taken away; the second run starts from the one before."""
    arguments = words("blockwise-adamw", "gpt2-124m", data, tmp_path, "--lr", "3e-3")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(RECIPES / "train_deepspeed.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    whole = curve(tmp_path)
    assert [line[:2] for line in whole] == [(step, step * 12 * 32) for step in range(2, 13, 2)]
    assert [line[0] for line in whole if line[3] is not None] == [6, 12]
    assert whole[-1][2] < whole[0][2] - 0.3 and whole[-1][4] == pytest.approx(3e-3 / 20)
    assert "step 12  tokens 4608  loss" in done.stdout
    shutil.rmtree(tmp_path / "checkpoints" / "global_step12")
    file = tmp_path / "curve.jsonl"
    file.write_text(file.read_text().replace('"step"', '"first_run": true, "step"'))
    pool(2).run(run, arguments)
    assert curve(tmp_path) == whole
    assert curve(tmp_path, "first_run") == 3 * [(True,)] + 3 * [(None,)]


def first_loss(data):
    """The mean loss of the fresh model on the first step's 12 windows, in one process."""
    import train_deepspeed
    from sequences import Sequences

    settings = json.loads(shrunk("llama-0.25b", data).read_text())
    model = train_deepspeed.build_model(settings, 1024, seed=41).to(torch.bfloat16)
    windows = Sequences(data / "training.bin", 32).batch(0, 12, seed=41)
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1]).logits.float()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_arms_start_from_the_same_loss_and_learn(data, tmp_path):
    """Weights and data are the same, so the first loss is; then each optimizer goes its way."""
    curves = {}
    for arm in ARMS:
        lr = "6e-4" if arm == "blockwise-lion" else "3e-3"
        more = ["--lr", lr, "--log-interval", "1", "--save-interval", "100"]
        rates = pool(2).run(run, words(arm, "llama-0.25b", data, tmp_path / arm, *more))
        assert rates == 2 * [{round(float(lr) / 20, 9)}]  # one minimum for all block types
        curves[arm] = curve(tmp_path / arm, "loss")
    assert len({losses[0] for losses in curves.values()}) == 1
    assert curves["adamw"][0][0] == pytest.approx(first_loss(data), abs=1e-4)
    assert len({losses[-1] for losses in curves.values()}) == len(ARMS)
    assert all(losses[-1][0] < losses[0][0] - 0.05 for losses in curves.values())


def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank(data, tmp_path):
    arguments = words("adamw", "gpt2-124m", data, tmp_path, "--lr", "1e30")
    answers = pool(2).run(run, arguments)
    assert all("lower --lr" in answer and "the loss is nan" in answer for answer in answers)
    assert not list(tmp_path.glob("checkpoints/*"))
