"""examples/slurm/megatron.sbatch on a real Slurm: Megatron's pretrain() through our runner, preempted and gone on with."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from jobs.slurm import running, why_not

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core carries no megatron.training", allow_module_level=True)

from megatron_door.test_pretrain import FLAGS, SCRIPT, data  # noqa: F401 - data is a fixture

FILE = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "megatron.sbatch"
STEPS = 40
LAYOUT = ["--tensor-model-parallel-size", "2", "--train-iters", str(STEPS), "--log-interval", "1"]
LINE = re.compile(r"iteration +(\d+)/ +\d+ .*?lm loss: (\S+)")

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.timeout(900)]


def environment(folder):
    return {
        "VENV": str(folder / "venv"),
        "MEGATRON": str(folder / "Megatron-LM"),
        "NPROC": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def words(corpus, *more):
    return ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache"), *more]


def whole(corpus):
    """The log of the same ranks with nothing that happens to them, without Slurm."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ["-m", "blockwise_lr.megatron", "--on-cpu", str(SCRIPT), *FLAGS, *LAYOUT, "--optimizer", "blockwise_adamw"]
    run = subprocess.run([*start, *script, *words(corpus)], capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.full  # three starts of Megatron on two ranks
def test_a_preempted_megatron_job_saves_is_requeued_and_goes_on(data, tmp_path):  # noqa: F811
    wanted = LINE.findall(whole(data))
    assert len(wanted) == STEPS
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'export PATH="{os.path.dirname(sys.executable)}:$PATH"\n')
    (tmp_path / "Megatron-LM").mkdir()
    shutil.copy(SCRIPT, tmp_path / "Megatron-LM" / "pretrain_gpt.py")
    (tmp_path / "model.args").write_text(" ".join([*FLAGS, *LAYOUT, "--optimizer", "blockwise_adamw"]))
    job_file = tmp_path / "megatron.sbatch"  # with the one word more that a CPU needs
    job_file.write_text(FILE.read_text().replace("-m blockwise_lr.megatron ", "-m blockwise_lr.megatron --on-cpu "))
    log, saves = tmp_path / "log", str(tmp_path / "checkpoints")
    with running() as slurm:
        options = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}", f"--chdir={tmp_path}"]
        flags = words(data, "--save", saves, "--load", saves, "--save-interval", "1000")
        job = slurm.submit(
            *options, str(job_file), str(tmp_path / "model.args"), *flags, environment=environment(tmp_path)
        )

        def reached(step):
            return log.exists() and any(int(found) >= step for found, _ in LINE.findall(log.read_text()))

        try:
            slurm.until(lambda: reached(5), 300)
            slurm.run("scancel", "--signal=USR1", job)
            slurm.until(lambda: slurm.job(job)["Restarts"] == "1", 120)
            left = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
            slurm.until(lambda: reached(STEPS) and slurm.job(job)["JobState"] == "COMPLETED", 300)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-6000:] if log.exists() else 'no log'}") from None
    found = LINE.findall(log.read_text())
    assert 5 <= left < STEPS and [int(step) for step, _ in found] == list(range(1, STEPS + 1))
    # the second line after a start is Megatron's average of it and the first
    found, wanted = ({int(step): float(loss) for step, loss in lines} for lines in (found, wanted))
    wanted[left + 2] = pytest.approx((wanted[left + 1] + wanted[left + 2]) / 2, abs=1e-5)
    assert found == wanted
