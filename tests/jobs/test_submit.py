"""`blockwise-lr submit` and `jobs`: what they would send to each kind of cluster, and what they refuse."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockwise_lr.cli import app
from blockwise_lr.jobs import PBS, Job, Kubernetes, Slurm

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
COMMAND = ["train.py", "--deepspeed_config", "a b.json"]


def submit(*words, command=COMMAND):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["submit", *words, "--", *command])


def test_a_dry_run_prints_sbatchs_command_line_and_the_file():
    options = (
        "--nodes",
        "4",
        "--time",
        "24:00:00",
        "--cpus-per-node",
        "32",
        "--name",
        "gpt",
        "--env",
        "A=1 2",
        "--option=-p x",
    )
    done = submit(*options, "--container", "nemo:26.04", "--dry-run")
    assert done.exit_code == 0, done.output
    line, _, file = done.stdout.partition("\n\n")
    words = shlex.split(line)
    assert "A=1 2" in words and "VENV=.venv" in words
    assert any(word.startswith("SRUN_OPTIONS=--container-image=nemo:26.04 --container-mounts=") for word in words)
    start = words.index("sbatch")
    assert words[start : start + 2] == ["sbatch", "--parsable"] and words[-3:] == COMMAND
    assert {"--nodes=4", "--gpus-per-node=8", "--cpus-per-task=32", "--time=24:00:00", "--job-name=gpt", "-p x"} <= set(
        words
    )
    assert file.split("\n", 1)[1].strip() == (ROOT / "examples" / "slurm" / "deepspeed.sbatch").read_text().strip()


def test_a_site_says_what_the_command_line_does_not(tmp_path):
    site = tmp_path / "site.toml"
    site.write_text(
        '[slurm]\ngpus = 4\ncpus = 16\nvenv = "/sw/env"\noptions = ["--partition=a100"]\nenv = { NCCL_DEBUG = "WARN" }\n'
    )
    done = submit("--site", str(site), "--cpus-per-node", "8", "--dry-run")
    words = shlex.split(done.stdout.partition("\n\n")[0])
    assert {"--gpus-per-node=4", "--cpus-per-task=8", "--partition=a100", "VENV=/sw/env", "NCCL_DEBUG=WARN"} <= set(
        words
    )
    site.write_text("[slurm]\ngpu = 4\n")
    done = submit("--site", str(site), "--dry-run")
    assert done.exit_code == 2 and "unknown key 'gpu'" in done.output and "did you mean 'gpus'" in done.output


def test_a_kubernetes_job_is_what_kubeflows_own_models_take():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = Job(COMMAND, nodes=2, gpus=4, container="registry/image:1", env={"A": "1 2"}, cpus=16)
    manifest = Kubernetes().manifest(job)
    taken = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert json.loads(taken.to_json()) == manifest  # nothing that they do not know
    assert manifest["spec"]["trainer"]["command"][-1].endswith("exec torchrun train.py --deepspeed_config 'a b.json'")
    done = submit("--cluster", "kubernetes", "--container", "registry/image:1", "--nodes", "2", "--dry-run")
    assert json.loads(done.stdout.split("<<'END'\n")[1].split("\nEND")[0])["spec"]["trainer"]["numNodes"] == 2


def test_a_pbs_job_is_a_shell_script_with_the_job_in_it(tmp_path):
    job = Job(
        COMMAND, nodes=4, cpus=64, time="24:00:00", name="gpt", env={"A": "it's"}, options=["-q gpu"], array="0-3"
    )
    script = PBS().script(job)
    for line in (
        "#PBS -N gpt",
        "#PBS -l select=4:mpiprocs=1:ngpus=8:ncpus=64",
        "#PBS -l walltime=24:00:00",
        "#PBS -q gpu",
        "#PBS -J 0-3",
        "COMMAND=(train.py --deepspeed_config 'a b.json')",
        "NPROC=8",
        "BEFORE=85800",
    ):
        assert line in script.splitlines()
    file = tmp_path / "gpt.pbs"
    file.write_text(script)
    if SHELLCHECK.exists():
        done = subprocess.run([SHELLCHECK, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    assert re.search(r"^export A=", script, re.M)


@pytest.mark.parametrize(
    "words, said",
    [
        (("--cluster", "slrum"), "did you mean 'slurm'"),
        (("--nodes", "0"), "--nodes is 0; give 1 or more"),
        (("--time", "1 day"), "write hours:minutes:seconds"),
        (("--name", "My Job"), "use lower case letters"),
        (("--gpus-per-node", "0"), "say how many processes a node runs"),
        (("--env", "A"), "write KEY=VALUE"),
        (("--cluster", "kubernetes", "--dry-run"), "give --container IMAGE"),
        (("--cluster", "pbs", "--container", "x", "--dry-run"), "--container is for slurm and kubernetes"),
        (("--site", "nowhere.toml"), "cannot be read"),
    ],
)
def test_mistakes_are_told(words, said):
    done = submit(*words)
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


def test_without_the_clusters_commands_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submit()
    assert done.exit_code == 2 and "sbatch is not installed here" in done.output
    done = CliRunner().invoke(app, ["jobs", "--log", "7", "--records", str(tmp_path / "jobs.jsonl")])
    assert done.exit_code == 2 and "no job 7 was sent from here" in done.output


def test_times():
    assert [Job(COMMAND, time=time).seconds for time in ("24:00:00", "2-01:30", "0:10:05")] == [86400, 178200, 605]
    assert Slurm().environment(Job(COMMAND, gpus=0, processes=2))["NPROC"] == "2"


def test_the_environment_that_submits_is_the_jobs_but_in_a_container():
    line = submit("--dry-run").stdout.partition("\n\n")[0]
    assert f"VENV={sys.prefix}" in shlex.split(line) and sys.prefix != sys.base_prefix
    assert "VENV=" in shlex.split(submit("--venv", "", "--dry-run").stdout.partition("\n\n")[0])


def test_where_nothing_was_sent_the_list_says_so(tmp_path):
    done = CliRunner().invoke(app, ["jobs", "--records", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 0 and done.output == "no jobs were sent from here\n"
