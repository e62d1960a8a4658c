"""examples/continual: its page is that of its rows, and a tiny run goes from a checkpoint to new data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "continual"


def test_the_page_is_made_of_the_rows():
    code = (
        "from run import HERE, _rows, losses\n"
        "from rows import with_tables\n"
        "tables = {'losses': losses(_rows(HERE / 'rows.jsonl'))}\n"
        "print(with_tables((HERE / 'README.md').read_text(), tables), end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (FOLDER / "README.md").read_text() and "| re-warmed, 1% | 3 |" in done.stdout


def test_a_tiny_run_goes_on_where_the_old_one_ended(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for which, low in (("old", 0), ("new", 500)):
        for side, size in (("training", 50_000), ("validation", 10_000)):
            ids = np.random.default_rng(size).zipf(1.5, size).clip(max=500) + low
            np.save(text / f"continual-{which}-{side}.npy", ids.astype(np.uint16))
    words = [
        "--rung",
        "tiny",
        "--old-steps",
        "40",
        "--steps",
        "20",
        "--seeds",
        "1",
        "--arms",
        "not re-warmed",
        "re-warmed, 0%",
    ]
    words += ["--text", str(text), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    kept, warmed = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert kept["curve"]["old"][0] == warmed["curve"]["old"][0]  # of one checkpoint
    assert kept["curve"]["lr"] == pytest.approx([5e-4 / 20] * 3)
    assert warmed["curve"]["lr"][0] == pytest.approx(5e-4, rel=0.01) and warmed["curve"]["lr"][-1] == pytest.approx(
        5e-4 / 20
    )
    assert warmed["curve"]["new"][-1] < kept["curve"]["new"][-1]
    assert (tmp_path / "curves.png").exists() and "| re-warmed, 0% | 1 |" in done.stdout
