"""The Slurm job scripts: shellcheck, and what they would start, with stand-ins for Slurm's own commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))


@pytest.mark.parametrize(
    "script", [*SCRIPTS, *sorted((ROOT / "examples" / "pbs").glob("*.pbs"))], ids=lambda path: path.name
)
def test_shellcheck(script):
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([SHELLCHECK, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run(script, arguments, folder):
    """What the script has srun start on the second node, a word a line."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in (
        ("srun", '[[ $1 == --kill-on-bad-exit=1 ]] && shift && exec "$@"'),
        ("torchrun", 'printf "%s\\n" "$@"'),
        ("scontrol", "printf 'n1\\nn2\\n'"),
        ("blockwise-lr", "true"),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "20007",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": "1",
        "SLURMD_NODENAME": "n2",
        "SLURM_NODEID": "1",
        "VENV": str(folder / "venv"),
    }
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").write_text("")
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_deepspeed_starts_the_users_script_on_every_node(tmp_path):
    done = run(ROOT / "examples/slurm/deepspeed.sbatch", ["train.py", "--deepspeed_config", "a b.json"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--local_addr",
        "n2",
        "--rdzv_conf",
        "is_host=0",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "8",
        "--rdzv_id",
        "20007-1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "n1:27926",
        "train.py",
        "--deepspeed_config",
        "a b.json",
    ]


def test_megatron_reads_the_argument_file(tmp_path):
    file = "configs/megatron/llama-0.25b.args"
    done = run(ROOT / "examples/slurm/megatron.sbatch", [file, "--data-path", "my corpus"], tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    start = words.index("-m")
    assert words[start:] == [
        "-m",
        "blockwise_lr.megatron",
        "Megatron-LM/pretrain_gpt.py",
        *(ROOT / file).read_text().split(),
        "--exit-signal-handler",
        "--data-path",
        "my corpus",
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_they_say_how_to_use_them(script, tmp_path):
    done = run(script, [], tmp_path)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
