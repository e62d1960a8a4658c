"""The demo's parts, and a few real steps of it on two processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "demo"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which a very short demo has run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "run.py"), "--steps", "4"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "demo", done.stdout


def test_text_goes_through_the_tokenizer_and_back(finished):
    import sentencepiece
    from corpus import VOCABULARY, texts, tokens

    folder, _ = finished
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"python-{VOCABULARY}.model"))
    text = next(text for text in texts(validation=True) if len(text) > 2000)
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()
    training, validation = tokens(folder, validation=False), tokens(folder, validation=True)
    assert training.max() < VOCABULARY and 10 < len(training) / len(validation) < 60
    assert training.dtype == np.uint16


def test_no_validation_file_is_trained_on():
    from corpus import is_validation, source_files

    held_out = {path for path in source_files() if is_validation(path)}
    assert 5 < len(held_out) < 0.1 * len(source_files())


def test_the_demo_prints_its_table_and_draws(finished):
    folder, printed = finished
    results = json.loads((folder / "results.json").read_text())
    kinds = ["AdamW", "BlockwiseAdamW", "BlockwiseAdamMini"]
    assert [(run["optimizer"], run["seed"]) for run in results["runs"]] == [
        (kind, seed) for kind in kinds for seed in (0, 1)
    ]
    for kind in kinds[:2]:  # as many rates for both, at the length and on the text that is compared
        tried = [run for run in results["sweep"] if run["optimizer"] == kind]
        best = min(tried, key=lambda run: run["losses"][-1])
        assert len(tried) == 3 and best == next(run for run in results["runs"] if run["optimizer"] == kind)
    assert all(run["losses"][-1] < run["losses"][0] for run in results["runs"])
    adamw, blockwise, mini = (run["state_bytes"] for run in results["runs"][::2])
    assert abs(adamw - blockwise) < 64 and mini < 0.51 * adamw  # they differ by a step counter per group
    for words in ("validation loss", "BlockwiseAdamMini", "state per rank", "curves.png"):
        assert words in printed
    assert (folder / "curves.png").stat().st_size > 10_000


def test_steps_to_a_loss_are_interpolated():
    from report import steps_to

    run = {"steps": [10, 20, 30], "losses": [3.0, 2.0, 1.0]}
    assert steps_to(run, 1.5) == 25 and steps_to(run, 3.5) == 10 and steps_to(run, 0.5) is None


def test_the_page_says_what_the_kept_results_say():
    from report import with_tables

    page = EXAMPLES.parent / "README.md"
    text = page.read_text()
    assert "<!-- demo: demo/results/" in text and text == with_tables(text, page.parent), "run make figures"
    losses = {number for number in re.findall(r"\d\.\d{3}\b", text)}
    kept = json.loads((EXAMPLES / "results" / "python-3.11.2.json").read_text())
    assert len({run["seed"] for run in kept["runs"]}) == 2 and len(kept["sweep"]) == 6
    table = text[text.index("<!-- demo:") : text.index("<!-- end -->")]
    assert losses and all(number in table for number in losses)
