"""The runs of examples/norm_placement: its page shows what its rows say, and the script trains and goes on."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "norm_placement"


def ran(*words):
    command = [sys.executable, str(FOLDER / "run.py"), *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_page_shows_the_rows():
    shown = ran("--seeds", 0)  # trains nothing
    assert shown.strip() in (FOLDER / "README.md").read_text()


def test_runs_that_are_there_are_not_repeated(tmp_path):
    small = ["--depths", 1, "--lrs", 2e-3, "--steps", 8, "--seeds", 1, "--rows", tmp_path / "rows.jsonl"]
    assert ran(*small).count("'seed': 0") == 3
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["post-LN, warmup", "post-LN", "pre-LN"]
    assert all(row["every_50"][0] > 5 > 0 < row["loss"] for row in rows)  # from about log 256
    assert "'seed': 0" not in ran(*small)
