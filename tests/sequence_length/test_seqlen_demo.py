"""examples/sequence_length: its page is that of its rows, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "sequence_length"


def inside(code):
    """What a program prints that has the example's modules."""
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_made_of_the_rows():
    page = (FOLDER / "README.md").read_text()
    made = inside(
        "from run import HERE, load, with_tables\n"
        "print(with_tables((HERE / 'README.md').read_text(), load(HERE / 'rows')), end='')"
    )
    assert made == page and "| 0.01 | warmup | 3 |" in page


def test_every_row_is_there_and_of_the_same_tokens():
    rows = [json.loads(file.read_text()) for file in (FOLDER / "rows").glob("*.json")]
    short = [row for row in rows if row["run"]["form"] == "short"]
    unclipped = [row for row in rows if row["run"]["form"] == "unclipped"]
    assert (len(short), len(unclipped)) == (36, 18) and len({row["text"] for row in rows}) == 1
    for row in short + unclipped:
        tokens = row["curve"]["tokens"][-1]
        assert row["final"] is None or 409_600 <= tokens < 409_600 + 16 * 256
        assert (row["steps"] > 100) == (row["run"]["arm"] == "warmup") or row["final"] is None


def test_a_tiny_form_runs_and_goes_on(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for side, size in (("training", 80_000), ("validation", 20_000)):
        np.save(text / f"{side}-1024.npy", np.random.default_rng(size).zipf(1.3, size).clip(max=1023).astype(np.uint16))
    words = [sys.executable, "run.py", "--form", "tiny", "--jobs", "1", "--out", str(tmp_path), "--text", str(text)]
    done = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {file: file.read_text() for file in tmp_path.glob("*.json")}
    assert len(rows) == 2 and "| 0.01 | warmup | 1 |" in done.stdout and (tmp_path / "tiny.png").exists()
    full, warmed = sorted((json.loads(text) for text in rows.values()), key=lambda row: row["run"]["arm"])
    assert (
        full["steps"] == 12 < warmed["steps"] and warmed["curve"]["tokens"][-1] >= full["curve"]["tokens"][-1] == 49152
    )
    again = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and all(file.read_text() == text for file, text in rows.items())
