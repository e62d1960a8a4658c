"""The evidence ladder: its plan, its page and a few real steps of its runner."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blockwise_lr.tuning.statistics import interval

REPRODUCE = Path(__file__).resolve().parents[2] / "examples" / "reproduce"
ROWS = REPRODUCE / "rows"
MODULES = ("model", "data", "arms", "training", "plan", "results", "figures", "runner")


@pytest.fixture(scope="module")
def ladder():
    """The ladder's modules, by name; they go again, as the demo has a model of its own."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(REPRODUCE))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(REPRODUCE))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def row_of(run, final, curve=None):
    steps = [10, 20, 30, 40]
    return {
        "run": dataclasses.asdict(run),
        "steps": 40,
        "final": final,
        "curve": {"step": steps, "training": steps, "validation": curve or [7.0, 6.0, 5.0, final]},
    }


def test_every_row_is_of_the_run_that_its_name_says_and_of_todays_arms(ladder):
    rows = ladder["plan"].load_rows(ROWS)
    assert rows
    for key, row in rows.items():
        run = ladder["training"].Run(**row["run"])
        assert run.key == key and run.arm in ladder["arms"].ARMS and run.steps == row["steps"]
        assert row["lr"] == ladder["arms"].learning_rate(run.k) and row["tokens"] == row["steps"] * run.batch
        curve = row["curve"]
        assert len(curve["step"]) == len(curve["training"]) == len(curve["validation"])
        if row["final"] is not None:
            assert (
                curve["step"][-1] == row["steps"] and abs(curve["validation"][-1] - row["final"]) < 0.5
            )  # on fewer tokens
        assert row["commit"] and row["versions"]["torch"] and row["text"]


def test_all_rows_of_a_corpus_are_of_one_text(ladder):
    rungs, rows = ladder["model"].RUNGS, ladder["plan"].load_rows(ROWS).values()
    texts = {(rungs[row["run"]["rung"]].corpus, row["text"]) for row in rows}
    assert len(texts) == len({corpus for corpus, _ in texts})


def test_the_page_says_what_the_rows_say(ladder):
    page = (REPRODUCE / "README.md").read_text()
    assert page == ladder["figures"].with_tables(page, ladder["plan"].load_rows(ROWS)), (
        "run python examples/reproduce/figures.py"
    )
    tables = re.findall(r"<!-- rows: (\w+) -->\n(.*?)<!-- end -->", page, re.S)
    assert [name for name, _ in tables] == list(ladder["figures"].TABLES)
    made = "".join(table for _, table in tables)
    words = re.sub(r"<!-- rows: \w+ -->\n.*?<!-- end -->", "", page, flags=re.S)
    for number in re.findall(r"[+−-]?\d\.\d{3}\b", words):  # losses and gains quoted outside of the tables
        assert number.lstrip("+−-") in made, f"the page quotes {number}, which no table has"


def test_the_plan_can_be_run_and_is_costed(ladder):
    entries = ladder["plan"].load_plan()
    named = [(entry.cell, arm) for entry in entries for arm in entry.arms]
    assert len(named) == len(set(named)), "an arm stands twice in a cell"
    assert all(entry.core_hours and entry.question for entry in entries)


@pytest.mark.parametrize(
    "change", [{"rung": "7B"}, {"arms": ["sgd"]}, {"arms": []}, {"batch": 1000}, {"seeds": 0}, {"center": {"mini": 0}}]
)
def test_an_entry_that_cannot_be_run_is_refused(ladder, tmp_path, change):
    entry = {"rung": "tiny", "tokens_per_parameter": 5, "batch": 2048, "arms": ["adamw"], "question": "?", **change}
    (tmp_path / "plan.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="entry 0"):
        ladder["plan"].load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("optimum", [-9, 0, 3.2, 8])
def test_a_grid_goes_on_until_the_best_is_inside_and_then_the_seeds_come(ladder, optimum, refine):
    plan = ladder["plan"]
    entry, step = plan.Entry("tiny", 5, 2048, ("adamw",), "?", refine=refine), 1 if refine else 2
    rows, order = {}, []
    while runs := plan.next_runs([entry], rows):
        assert not {run.key for run in runs} & set(rows)
        order += [(run.k, run.seed) for run in runs[:1]]
        # beyond the optimum it diverges at once
        rows[runs[0].key] = row_of(runs[0], None if runs[0].k > optimum + 3 else 3 + (runs[0].k - optimum) ** 2 / 100)
    tried = sorted(k for k, seed in order if seed == 0)
    best = min(tried, key=lambda k: abs(k - optimum))
    assert abs(best - optimum) <= step / 2 and {best - step, best + step} <= set(tried)
    assert order[-2:] == [(best, 1), (best, 2)] and sum(seed > 0 for _, seed in order) == 2
    found = ladder["results"].results(rows)["tiny-5tpp-2k"]["adamw"]
    assert found.k == best and found.inside and list(found.seeds) == [0, 1, 2]


def test_an_arm_at_anothers_rate_waits_for_it_and_then_takes_it(ladder):
    plan = ladder["plan"]
    entries = [
        plan.Entry("tiny", 5, 2048, ("adamw",), "?", seeds=1),
        plan.Entry("tiny", 5, 2048, ("blockwise-adamw-lr",), "?"),
    ]
    rows, order = {}, []
    while runs := plan.next_runs(entries, rows):
        order.append((runs[0].arm, runs[0].k, runs[0].seed))
        rows[runs[0].key] = row_of(runs[0], 3 + (runs[0].k - 8) ** 2 / 100)
    assert order[-3:] == [("blockwise-adamw-lr", 8, seed) for seed in range(3)]
    assert {k for arm, k, _ in order if arm == "adamw"} == {2, 4, 6, 8, 10}
    assert ladder["results"].results(rows)["tiny-5tpp-2k"]["blockwise-adamw-lr"].inside


def test_gains_and_steps_are_paired_by_seed(ladder):
    Run, results = ladder["training"].Run, ladder["results"]
    rows = {}
    for arm, finals, middle in (("adamw", (4.0, 4.2, 4.4), 5.0), ("blockwise", (3.9, 4.0, 4.1), 5.5)):
        for seed, final in enumerate(finals):
            run = Run("tiny", 5, 2048, arm, 0, seed)
            rows[run.key] = row_of(run, final, [7.0, 6.0, middle, final])
    base, other = results.results(rows)["tiny-5tpp-2k"].values()
    assert results.gains(base, other) == pytest.approx([0.1, 0.2, 0.3])
    mean, half = interval(results.gains(base, other))
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert results.step_shares(base, other)[0] == pytest.approx((30 + 10 * 1.5 / 1.6) / 40)
    assert results.crossings(base, other) == [1.0] * 3 and results.crossings(other, base) == [float("inf")] * 3


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder of encoded text that stands in for the real one, whose making takes longer than the runs."""
    folder = tmp_path_factory.mktemp("text")
    ids = np.random.default_rng(0).zipf(1.5, 40_000) % 1024
    for side, part in (("training", ids[:16_384]), ("validation", ids[16_384:])):
        np.save(folder / f"{side}-1024.npy", part.astype(np.uint16))
    return folder


def test_all_batch_sizes_see_the_same_text_once_an_epoch(ladder, encoded):
    text = ladder["data"].Text(encoded)
    windows = (len(text.training) - 1) // 128
    assert windows == 127
    small = torch.cat([text.batch(7, step, 4) for step in range(64)])
    assert torch.equal(small, torch.cat([text.batch(7, step, 32) for step in range(8)]))
    starts = {tuple(window) for window in small[:windows].tolist()}
    assert len(starts) == windows and {tuple(window) for window in small[windows : 2 * windows].tolist()} == starts
    assert not torch.equal(small[:windows], small[windows : 2 * windows])
    assert not torch.equal(small, torch.cat([text.batch(8, step, 4) for step in range(64)]))


def test_text_is_held_out_by_file_on_both_sides_and_goes_through_the_tokenizer(ladder, tmp_path, monkeypatch):
    data = ladder["data"]
    monkeypatch.setattr(data, "_files", lambda root, files=data._files: files(root)[:400:5])
    training, validation = list(data.documents(validation=False)), list(data.documents(validation=True))
    assert validation and len(validation) < 0.15 * len(training) and not set(validation) & set(training)
    text = data.Text(tmp_path)
    tokenizer = data.tokenizer(tmp_path, 1024, "mixed")
    assert tokenizer.decode(tokenizer.encode(training[1])).strip() == training[1].strip()
    assert text.training[:200].tolist() == [n for part in training for n in tokenizer.encode(part)][:200]
    assert text.training.max() < 1024 and text.held_out(8).shape == (8, 129)


def test_ratios_of_1_are_the_adamw_arm(ladder, encoded, monkeypatch):
    """So that what differs between the arms is the ratios, and neither decay, schedule nor order of the text."""
    arms, training, text = ladder["arms"], ladder["training"], ladder["data"].Text(encoded)
    monkeypatch.setattr(training, "CURVE", 1024)
    monkeypatch.setattr(training, "FINAL", 1024)
    place = training.Place()
    for name in ("adamw", "adamw-decay-all", "adamw-floor-0"):
        arm = arms.ARMS[name]
        same = dataclasses.replace(arm, optimizer="BlockwiseAdamW", options=arms._ratios())
        monkeypatch.setitem(arms.ARMS, f"{name}-ones", same)
        finals = [
            training.train(training.Run("tiny", 10, 1024, which, 4, 0), text, place)["curve"]["validation"]
            for which in (name, f"{name}-ones")
        ]
        assert finals[1] == pytest.approx(finals[0], abs=2e-5) and finals[0][-1] < finals[0][0] - 0.5


def test_a_run_writes_its_row_once_and_again_to_the_same_losses(tmp_path, encoded):
    """Real runs by real processes: the second goes on behind the first, a third in another folder repeats it."""
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps(
            [
                {
                    "rung": "tiny",
                    "tokens_per_parameter": 2,
                    "batch": 1024,
                    "question": "?",
                    "arms": ["blockwise", "adamw"],
                }
            ]
        )
    )

    def start(rows, runs):
        done = subprocess.run(
            [
                sys.executable,
                str(REPRODUCE / "runner.py"),
                "run",
                "--plan",
                str(plan),
                "--rows",
                str(tmp_path / rows),
                "--text",
                str(encoded),
                "--limit",
                str(runs),
            ],
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {file.name: json.loads(file.read_text()) for file in (tmp_path / rows).glob("*.json")}

    first = start("rows", 1)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "rows").glob("*.json")}
    second, other = start("rows", 3), start("elsewhere", 1)
    assert len(first) == len(other) == 1 and len(second) == 4
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    for name, row in first.items():
        assert row["curve"] == other[name]["curve"] and row["final"] == other[name]["final"]
        assert row["final"] < 6.94 and row["tokens"] == row["steps"] * 1024 and row["peak_memory_bytes"] > 1e7
    assert len({row["final"] for row in second.values()}) == 4
    assert not list((tmp_path / "rows").glob(".*"))
