"""`blockwise-lr plan`."""

import json
import math
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockwise_lr.cli import app

LLAMA = "configs/models/llama-0.25b.json"


def plan(*words):
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *map(str, words)])


def test_a_budget_in_devices_and_days_fits_one_screen():
    done = plan("--gpus", 64, "--days", 7, "--gpu", "a100", "--mfu", 0.5)
    assert done.exit_code == 0, done.output
    compute = 64 * 312e12 * 0.5 * 7 * 86400
    assert f"{compute:.3g} FLOPs, 7 days" in done.stdout and "Extrapolation" in done.stdout
    assert len(done.stdout.splitlines()) < 40
    for law in ("Porian", "Step Law", "DeepSeek", "Bjorck"):
        assert law in done.stdout


def test_a_model_brings_its_size_its_operations_and_its_memory():
    done = plan(LLAMA, "--tokens", 5e9, "--ranks", 8, "--zero", 1, "--optimizer", "adam_mini", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tokens"] == 5e9 and found["parameters"] == found["size"]["active"]
    assert found["flops"] == pytest.approx(5e9 * (6 * found["size"]["active"] + 6 * 2048 * found["size"]["attended"]))
    mini, adamw = found["memory"]["states"], found["memory"]["with_adamw"]
    assert adamw["moments"] == pytest.approx(found["size"]["parameters"], rel=1e-4)  # 8 bytes over 8 ranks
    assert 0.5 < mini["moments"] / adamw["moments"] < 0.51 and found["memory"]["activations"] > 1e9
    assert plan(LLAMA, "--tokens", 5e9, "--ranks", 8).exit_code == 0


def test_it_writes_what_it_recommends(tmp_path):
    done = plan("--parameters", 1e9, "--tokens", 2e10, "--ranks", 16, "--write", tmp_path / "out")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "ds_config.json").read_text())
    flags = dict(
        line.split(maxsplit=1) for line in (tmp_path / "out" / "megatron.args").read_text().splitlines() if " " in line
    )
    assert config["train_batch_size"] == int(flags["--global-batch-size"]) and config["train_batch_size"] % 16 == 0
    assert config["scheduler"]["params"]["total_num_steps"] == int(flags["--train-iters"])
    assert config["optimizer"]["params"]["adamw_lr"] == pytest.approx(float(flags["--lr"]), rel=1e-2)


def test_under_a_sequence_length_warmup_the_same_tokens_take_more_steps(tmp_path):
    """GPT-2 1.5B as arXiv 2108.06084 trained it: 157B tokens in batches of 4096, from 64 to 1024 tokens over 45,000 steps."""
    words = ("--parameters", 1.5e9, "--tokens", 157286400000, "--length", 1024, "--batch", 4096 * 1024, "--ranks", 128)
    grows = ("--length-warmup-start", 64, "--length-warmup-steps", 45000)
    done = plan(*words, *grows, "--write", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    steps, tokens = 0, 0
    while tokens < 157286400000:  # the pacing function, written out
        steps += 1
        length = 1024 if steps >= 45000 else int(64 + (1024 - 64) * steps / 45000)
        tokens += 4096 * (length if length == 1024 else max(length - length % 8, 64))
    assert found["steps"] == steps and 37500 < steps < 75000
    config = json.loads((tmp_path / "ds_config.json").read_text())
    assert config["sequence_length_warmup"] == {"start": 64, "end": 1024, "steps": 45000}
    assert config["scheduler"]["params"]["total_num_tokens"] == 157286400000
    flags = (tmp_path / "megatron.args").read_text().splitlines()
    assert "--sequence-length-warmup-start 64" in flags and "--lr-decay-tokens 157286400000" in flags
    assert f"--train-iters {steps}" in flags
    assert "37,500 at full length" in plan(*words, *grows).stdout
    alone = plan(*words, *grows[:2])
    assert alone.exit_code == 2 and "go together" in alone.output


def test_a_law_of_ones_own_runs_is_said_beside(tmp_path):
    file = tmp_path / "runs.csv"
    rows = [
        (flops, size, 2 + 0.05 * math.log(size / (0.3 * flops**0.5)) ** 2)
        for flops in (1e17, 1e18, 1e19)
        for size in (0.3 * flops**0.5 * 2**k for k in (-2, -1, 0, 1, 2))
    ]
    file.write_text("flops,parameters,loss\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    done = plan("--flops", 1e18, "--runs", file)
    assert done.exit_code == 0, done.output
    own = re.search(r"optimal by your own runs: 30[01]M \(3 budgets, exponent 0.50\d;", done.stdout)
    assert own, done.stdout
    file.write_text("flops,loss\n1,2\n")
    bad = plan("--flops", 1e18, "--runs", file)
    assert bad.exit_code == 2 and "without the numbers" in bad.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "none of flops, parameters and tokens"),
        (("--days", 3), "--days needs --gpus"),
        (("--gpus", 8, "--days", 3, "--flops", 1e20), "give one of them"),
        (("--flops", 1e20, "--gpu", "h1000"), "--gpu is 'h1000'"),
        (("--flops", 1e20, "--mfu", 2), "--mfu is 2"),
        ((LLAMA, "--parameters", 1e9), "says its own"),
        ((LLAMA, "--zero", 5, "--tokens", 1e9), "stage is 5"),
        (("--flops", 1e20, "--optimizer", "lion", "--write", "x"), "no learning rate for lion"),
        (("nowhere.json", "--tokens", 1e9), "no file"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(words, said):
    done = plan(*words)
    assert not Path("x").exists()
    assert done.exit_code == 2 and said in done.output and done.output.count("blockwise-lr plan:") == 1


def test_a_second_plan_stands_beside_by_what_is_other_in_it(tmp_path):
    words = (LLAMA, "--tokens", 5e9, "--ranks", 8, "--length", 512)
    done = plan(*words, "--compare", "--optimizer adam_mini --zero 2")
    assert done.exit_code == 0, done.output
    marked = {line.split("│")[2].strip() for line in done.stdout.splitlines() if line.startswith("│ *")}
    assert marked == {"optimizer", "layout", "gradients", "moments", "states, total", "peak of a step"}
    found = json.loads(plan(*words, "--compare", "--optimizer adam_mini --zero 2", "--json").stdout)
    alone = [
        json.loads(plan(*words, *more, "--json").stdout) for more in ((), ("--optimizer", "adam_mini", "--zero", 2))
    ]
    assert found["plans"] == alone
    moments = [one["memory"]["states"]["moments"] for one in alone]
    assert found["differences"]["memory.states.moments"] == moments and moments[0] > moments[1]
    assert "tokens" not in found["differences"]
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(alone[1]))
    again = json.loads(plan(*words, "--compare", saved, "--json").stdout)
    assert again["differences"] == found["differences"]


def test_compared_budgets_take_the_place_of_one_another():
    done = plan("--parameters", 1e9, "--tokens", 2e10, "--compare", "--flops 1e21", "--json")
    first, second = json.loads(done.stdout)["plans"]
    assert first["flops"] == pytest.approx(1.2e20) and second["flops"] == pytest.approx(1e21)
    assert first["parameters"] == second["parameters"] == 1e9


def test_an_argument_file_has_the_memory_of_its_layout():
    words = ("configs/megatron/llama-3-70b.args", "--vocabulary", 128256, "--tokens", 1e12, "--gpus", 512, "--json")
    found = json.loads(plan(*words).stdout)["memory"]
    assert found["layout"] == "TP8 x PP8 x DP8, distributed optimizer" and found["ranks"] == 512
    # the first stage's rank: 10 of 80 layers, and an eighth of the embedding
    layer = 8192 * (64 + 16) * 128 + 8192 * 8192 + 3 * 8192 * 28672
    slices = (10 * layer + 129024 * 8192) / 8 + 20 * 8192  # 128,256 rows padded to a multiple of 8 x 128
    states = found["states"]
    assert states["parameters"] == pytest.approx(2 * slices, rel=1e-4)
    assert states["gradients"] == 2 * states["parameters"] and states["moments"] == 2 * states["masters"]
    assert states["masters"] == pytest.approx(4 * slices / 8, rel=1e-3)
    assert json.loads(plan(*words, "--tensor-parallel", 4).stdout)["memory"]["layout"].startswith("TP4 x PP8 x DP16")
    assert json.loads(plan(*words, "--zero", 1).stdout)["memory"]["layout"] == "ZeRO-1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--flops", 1e20, "--compare", "--flop 1"), "--compare '--flop 1': No such option"),
        (("--flops", 1e20, "--compare", "--json"), "are said once, outside of it"),
        (("--flops", 1e20, "--compare", "nowhere.json"), "nowhere.json"),
        (("--flops", 1e20, "--compare", LLAMA), "is no plan; write it with blockwise-lr plan ... --json"),
        (("--flops", 1e20, "--tensor-parallel", 2), "are for a Megatron argument file"),
        (
            ("configs/megatron/llama-3-70b.args", "--vocabulary", 128256, "--tokens", 1e12, "--gpus", 100),
            "--gpus 100 is no multiple of the 64 ranks",
        ),
    ],
)
def test_what_cannot_be_compared_or_laid_out_is_one_sentence(words, said):
    done = plan(*words)
    assert done.exit_code == 2 and said in done.output and done.output.count("blockwise-lr plan:") == 1, done.output
