"""`blockwise-lr tune` with a real training script."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from blockwise_lr.cli import app

SCRIPT = Path(__file__).with_name("script.py")
PLACES = ["--lr", "{lr}", "--ratios", "{ratios}", "--seed", "{seed}"]


def tune(out, *options, command=(sys.executable, str(SCRIPT), *PLACES)):
    words = ["tune", "--out", str(out), *map(str, options), "--", *command]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, words)


def test_it_finds_ratios_goes_on_and_says_what_they_gain(tmp_path):
    options = ("--lr", 0.08, "--blocks", "embedding,ffn", "--start", "uniform", "--seeds", 2, "--jobs", 2, "--json")
    first = tune(tmp_path, *options, "--trials", 7)
    assert first.exit_code == 0, first.output
    begun = json.loads(first.stdout)["runs"]
    assert 5 <= len(begun) <= 7 and all(row["loss"] is not None for row in begun)
    logs = {file: file.read_text() for file in tmp_path.glob("run-*/log")}
    shown = tune(tmp_path, *options[:-1], "--trials", 9)
    assert shown.exit_code == 0, shown.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(file.read_text() == text for file, text in logs.items())  # not run again
    assert len(begun) < len(result["runs"]) <= 9 and len(list(tmp_path.glob("run-*"))) == len(result["runs"])
    for row in result["runs"]:
        log = next(
            file
            for file in tmp_path.glob("run-*/log")
            if f"loss {row['loss']:.4f}" in file.read_text().splitlines()[-1]
        )
        assert log
    best, adamw = result["best"], result["adamw"]
    assert best["loss"] <= adamw["loss"] and set(adamw["block_lr_ratios"].values()) == {1.0}
    assert "Best ratios against the best single rate" in shown.output and "--block-lr-ratios embedding=" in shown.output
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    other = tune(tmp_path, *options, "--trials", 9, command=(sys.executable, str(SCRIPT), "--x", *PLACES))
    assert other.exit_code == 2 and "holds the runs of another command" in other.output


def test_halving_stops_runs_and_a_ds_config_is_filled(tmp_path):
    base = tmp_path / "base.json"
    base.write_text(json.dumps({"optimizer": {"type": "BlockwiseAdamW", "params": {"adamw_lr": 1}}, "fp16": {}}))
    command = (sys.executable, str(SCRIPT.with_name("curve.py")), "{ds_config}")
    options = ("--ds-config", base, "--halving", "--seeds", 1, "--blocks", "ffn", "--trials", 7, "--start", "uniform")
    done = tune(tmp_path / "out", *options, "--lr", 0.16, "--json", command=command)
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout)["runs"]
    assert any(row["loss"] is None for row in runs) and runs[0]["loss"] is not None
    config = json.loads((tmp_path / "out" / "run-000" / "ds_config.json").read_text())
    assert (
        config["optimizer"]["params"]["block_lr_ratios"] == dict.fromkeys(("ffn", "embedding", "qk", "vo", "norm"), 1.0)
        and config["fp16"] == {}
    )
    assert "adamw_lr" not in config["optimizer"]["params"]
    stopped = [file for file in (tmp_path / "out").glob("run-*/log") if "step 8" not in file.read_text()]
    assert stopped and all("step 2 " in file.read_text() for file in stopped)


def test_an_interrupt_ends_the_runs_and_a_second_start_goes_on(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfor step in range(3000):\n    print(f'step {step} loss 3', flush=True)\n    time.sleep(0.1)"
    )
    words = [
        "-m",
        "blockwise_lr.cli",
        "tune",
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "2",
        "--",
        sys.executable,
        str(script),
    ]
    search = subprocess.Popen(
        [sys.executable, *words, *PLACES],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background ignores it, and hands that on
    )
    logs = tmp_path / "out"
    deadline = time.monotonic() + 60
    while len([log for log in logs.glob("run-*/log") if log.stat().st_size]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = psutil.Process(search.pid).children(recursive=True)
    assert len(children) == 2
    search.send_signal(signal.SIGINT)
    search.wait(timeout=90)
    assert not psutil.wait_procs(children, timeout=10)[1]
    short = script.read_text().replace("3000", "3")
    script.write_text(short)
    done = tune(logs, "--seeds", 1, "--blocks", "ffn", "--trials", 7, command=(sys.executable, str(script), *PLACES))
    assert done.exit_code == 2 and "holds the runs of another command or search" in done.output  # other blocks
    again = tune(logs, "--trials", 7, "--jobs", 2, command=(sys.executable, str(script), *PLACES))
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    "options, command, words",
    [
        ((), (sys.executable, str(SCRIPT), "--fail", *PLACES), "ended with exit code 1"),
        ((), (sys.executable, "-c", "print('done')", *PLACES), "printed no loss that --loss matches"),
        ((), ("python", "train.py", "--lr", "{lr}"), "has no place for what is tuned"),
        ((), ("python", "train.py", "{lr}", "{ratios}"), "has no {seed}"),
        ((), ("sh", "-c", "train {lr} {ratio_words} {seed}"), "{ratio_words} becomes several words"),
        (("--loss", "loss (.*)"), (sys.executable, *PLACES), "needs the groups"),
        (("--loss", "("), (sys.executable, *PLACES), "is no regular expression"),
        (("--start", "mine"), (sys.executable, *PLACES), "--start is mine; use one of paper"),
        (("--blocks", "kq"), (sys.executable, *PLACES), "--blocks names kq"),
        ((), ("python", "{ds_config}"), "go together"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value,
)
def test_mistakes_are_told(tmp_path, options, command, words):
    told = tune(tmp_path, *options, command=command)
    assert told.exit_code == 2 and words in told.output and "Traceback" not in told.output
