"""`blockwise-lr submit` on a real Slurm: preempted, requeued, gone on with to the bit; and a node that is lost."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed_door.engines import config, start, train
from extensions import build_once
from jobs.slurm import running, why_not
from ranks import pool
from twins import make
from typer.testing import CliRunner

from blockwise_lr.checkpoint import newest_complete, verify
from blockwise_lr.cli import app

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("train_on_slurm.py")
TOTAL, SECONDS = 12, 240

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def slurm():
    build_once()
    with running() as cluster:
        yield cluster


def submit(slurm, folder, environment=None, options=(), script=SCRIPT):
    """The number of a job that `blockwise-lr submit` has sent: on the CPU, a rank on each of two nodes by default."""
    (folder / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "venv" / "bin" / "activate").write_text(
        f'export PATH="{folder}/venv/bin:{os.path.dirname(sys.executable)}:$PATH"\n'
    )
    environment = {
        **(environment or {}),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    given = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    nodes = ["--nodes", "2"] if "--nodes" not in options else []
    words = [*nodes, "--gpus-per-node", "1", "--cpus-per-node", "1", "--name", "run", "--venv", str(folder / "venv")]
    said = command(slurm, folder, "submit", *words, *given, *options, "--", str(script), str(folder))
    return said.split(",")[0].removeprefix("sent: ")


def command(slurm, folder, *words):
    """What one of our commands prints, run in a job's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def without_doctor(folder):
    """Jobs from this folder do without its seconds; the first test's job has it."""
    doctor = folder / "venv" / "bin" / "blockwise-lr"
    doctor.parent.mkdir(parents=True)
    doctor.write_text("#!/bin/bash\n")
    doctor.chmod(0o755)


def lines(folder, rank=0):
    file = folder / f"losses-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps(folder):
    """Rank and step -> its losses; each step's are the same however often it was run."""
    found = {}
    for rank in (0, 1):
        for line in lines(folder, rank):
            if "step" in line:
                assert found.setdefault((rank, line["step"]), line["losses"]) == line["losses"]
    return found


def starts(folder):
    return [line["start"] for line in lines(folder) if "start" in line]


def is_done(folder):
    return all(any("done" in line for line in lines(folder, rank)) for rank in (0, 1))


def wait_for(slurm, folder, job, condition, seconds=SECONDS):
    try:
        slurm.until(condition, seconds)
    except AssertionError as error:
        log = folder / f"run-{job}.log"
        raise AssertionError(f"{error}\n{log.read_text()[-4000:] if log.exists() else 'no log'}") from None


def losses_of_every_step():
    engine = start(make("llama"), config("BlockwiseAdamW", 2, steps=TOTAL))
    found = [train(engine, 1, first=step) for step in range(TOTAL)]
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def whole():
    """The losses of a run that nothing happens to, without Slurm: rank and step -> losses."""
    answers = pool(2).run(losses_of_every_step)
    return {(rank, step): losses for rank, found in enumerate(answers) for step, losses in enumerate(found)}


def test_a_preempted_job_is_requeued_and_goes_on_to_the_bit(slurm, whole, tmp_path):
    job, at = submit(slurm, tmp_path), random.Random(job_seed()).randrange(1, 6)
    wait_for(slurm, tmp_path, job, lambda: (0, at) in steps(tmp_path))
    slurm.run("scancel", "--signal=USR1", job)  # as --signal=USR1@300 does before the time limit
    wait_for(slurm, tmp_path, job, lambda: slurm.job(job)["Restarts"] == "1")
    assert newest_complete(tmp_path / "checkpoints") is not None
    wait_for(slurm, tmp_path, job, lambda: is_done(tmp_path))
    first, second = starts(tmp_path)
    assert first == 0 and at < second <= at + 3
    # the update at whose end the ranks leave is saved, and its line is not printed any more
    assert {key: value for key, value in whole.items() if key[1] != second - 1} == {
        key: value for key, value in steps(tmp_path).items() if key[1] != second - 1
    }
    wait_for(slurm, tmp_path, job, lambda: slurm.job(job)["JobState"] == "COMPLETED", 60)
    log = command(slurm, tmp_path, "jobs", "--log", job)
    assert log.count("usable") >= 2  # doctor's table of kernels: both starts write to one log
    listed = command(slurm, tmp_path, "jobs")
    assert job in listed and "slurm" in listed and "COMPLETED" in listed


@pytest.mark.full  # Slurm takes half a minute to give a node up
def test_a_job_whose_node_is_lost_goes_on_elsewhere(slurm, whole, tmp_path):
    job = submit(slurm, tmp_path, environment={"PAUSE": "8", "SAVE_EVERY": "2"})
    wait_for(slurm, tmp_path, job, lambda: (0, 3) in steps(tmp_path))
    lost = next(line["node"] for line in lines(tmp_path, 1) if "node" in line)
    slurm.kill_node(lost)
    try:
        wait_for(slurm, tmp_path, job, lambda: len(starts(tmp_path)) == 2)
        wait_for(slurm, tmp_path, job, lambda: is_done(tmp_path))
    finally:
        slurm.start_node(lost)
        slurm.until(lambda: slurm.states() == ["idle"] * 3, 60)
    assert slurm.job(job)["Restarts"] == "1" and starts(tmp_path)[1] in range(2, TOTAL, 2)
    assert lost not in [line["node"] for rank in (0, 1) for line in lines(tmp_path, rank)[-TOTAL:] if "node" in line]
    assert steps(tmp_path) == whole
    verify(tmp_path / "checkpoints" / newest_complete(tmp_path / "checkpoints"))


def test_an_array_of_three_runs_a_sweep(slurm, tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(
        "import os, pathlib, sys\nnumber = os.environ['SLURM_ARRAY_TASK_ID']\nprint('run', number, flush=True)\n"
        "(pathlib.Path(sys.argv[1]) / number).write_text('ran')\n"
    )
    without_doctor(tmp_path)
    job = submit(slurm, tmp_path, options=("--nodes", "1", "--array", "0-2"), script=script)
    wait_for(slurm, tmp_path, job, lambda: all((tmp_path / str(number)).exists() for number in range(3)), 120)
    log = command(slurm, tmp_path, "jobs", "--log", job)
    assert log.count("==> ") == 3 and all(f"run {number}\n" in log for number in range(3))


def tuned(slurm, folder, *start):
    """What `blockwise-lr tune` finds over a bowl whose far side never ends, each run started by further words."""
    folder.mkdir()
    base, script = folder / "base.json", folder / "bowl.py"
    base.write_text(json.dumps({"optimizer": {"type": "BlockwiseAdamW", "params": {"lr": 1}}}))
    script.write_text(
        "import json, math, os, sys, time\n"
        "params = json.loads(open(sys.argv[1]).read())['optimizer']['params']\n"
        "print('in job', os.environ.get('SLURM_JOB_ID'), flush=True)\n"
        "rate = params['lr'] * params['block_lr_ratios']['ffn']\n"
        "if rate > 0.3:\n"
        "    print('step 1 loss nan', flush=True)\n"
        "    time.sleep(600)\n"
        "print('step 1 loss', 2 + math.log2(rate / 0.2) ** 2, flush=True)\n"
    )
    options = ("--ds-config", str(base), "--blocks", "ffn", "--start", "uniform", "--seeds", "1", "--trials", "9")
    run = (*start, sys.executable, str(script), "{ds_config}")
    out = folder / "out"
    said = command(
        slurm, folder, "tune", "--out", str(out), "--lr", "0.16", "--jobs", "3", "--json", *options, "--", *run
    )
    return json.loads(said), [file.read_text().split()[2] for file in sorted(out.glob("run-*/log"))]


def test_tune_runs_as_jobs_and_ends_those_that_diverge(slurm, tmp_path):
    here, without = tuned(slurm, tmp_path / "here")
    words = ("srun", "--quiet", "--nodes=1", "--cpus-per-task=1", "--job-name=tune")
    there, jobs = tuned(slurm, tmp_path / "there", *words)
    assert set(without) == {"None"} and len(set(jobs)) == len(jobs) >= 5  # each run a job of its own
    losses = [
        {(row["lr"], row["block_lr_ratios"]["ffn"]): row["loss"] for row in found["runs"]} for found in (here, there)
    ]
    common = losses[0].keys() & losses[1].keys()  # which runs follow depends on which ended first
    assert len(common) >= 3 and None in losses[1].values()
    assert all(losses[0][key] == losses[1][key] for key in common)
    assert there["best"]["loss"] == pytest.approx(here["best"]["loss"], abs=0.2)
    slurm.until(lambda: not slurm.run("squeue", "--noheader", "--name=tune"), 60)


def test_a_job_can_be_ended(slurm, tmp_path):
    without_doctor(tmp_path)
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(100)\n")
    job = submit(slurm, tmp_path, script=tmp_path / "wait.py")
    wait_for(slurm, tmp_path, job, lambda: slurm.job(job)["JobState"] == "RUNNING", 60)
    command(slurm, tmp_path, "jobs", "--cancel", job)
    wait_for(slurm, tmp_path, job, lambda: slurm.job(job)["JobState"] == "CANCELLED", 60)


def test_a_job_that_no_node_can_run_is_refused(slurm, tmp_path):
    words = ["submit", "--gpus-per-node", "1", "--cpus-per-node", "99", "--", "train.py"]
    done = subprocess.run(
        [sys.executable, "-m", "blockwise_lr.cli", *words],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "has at most 64 CPUs and the job asks for 99" in done.stderr


def job_seed():
    """Another moment each time, and the same for one run of the tests."""
    return os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
