"""examples/kubernetes: known to Kubeflow's models and Kubernetes' own schemas, and what their pods would start."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ranks import free_port

from blockwise_lr.jobs import Job, Kubernetes

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "kubernetes"


def read(name):
    return yaml.safe_load((FILES / name).read_text())


def started(command, folder, **environment):
    """The words that a pod's command gives torchrun."""
    (folder / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "torchrun").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["deepspeed.yaml", "megatron.yaml"])
def test_a_train_job_holds_only_what_kubeflow_knows(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = read(name)
    known = lambda given: json.loads(models.TrainerV1alpha1TrainJob.from_dict(given).to_json())  # noqa: E731
    assert known(job) == job
    wrong = copy.deepcopy(job)
    wrong["spec"]["trainer"]["numNode"] = 4
    assert known(wrong) != wrong  # that would have been found


def test_the_sweep_is_a_job_by_kubernetes_strict_schema():
    validator = pytest.importorskip("kubernetes_validate")
    job = read("sweep.yaml")
    for version in ("1.30", "1.37"):
        validator.validate(job, version, strict=True)
    job["spec"]["backofLimit"] = 1
    with pytest.raises(validator.ValidationError, match="backofLimit"):
        validator.validate(job, "1.37", strict=True)


SCRIPT = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
seen = torch.ones(1) * rank
dist.all_reduce(seen)
# who leaves while the other is still in a collective of gloo breaks it, and torchrun waits 300 s for the broken one
store = dist.distributed_c10d._get_default_store()
store.set(f"done {rank}", "")
store.wait([f"done {one}" for one in range(ranks)])
print("rank", rank, "of", ranks, "sum", int(seen), sys.argv[1:], flush=True)
"""


def outputs(pods, seconds):
    """What processes print; those that have not ended by then are killed, so that what all of them printed is told."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and any(pod.poll() is None for pod in pods):
        time.sleep(0.1)
    for pod in pods:
        if pod.poll() is None:
            os.killpg(pod.pid, signal.SIGKILL)  # its ranks too, which hold its output open
    return [pod.communicate()[0] for pod in pods]


def test_the_pods_of_a_job_meet_by_what_kubeflow_sets(tmp_path):
    """Each pod's command as it is, with the variables that Trainer's torch runtime gives torchrun."""
    (tmp_path / "train.py").write_text(SCRIPT)
    job = Job(["train.py", "--deepspeed_config", "a b.json"], nodes=2, gpus=0, processes=1, container="image", venv="")
    trainer = Kubernetes().manifest(job)["spec"]["trainer"]
    shared = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
    }
    pods = [
        subprocess.Popen(
            trainer["command"],
            cwd=tmp_path,
            env={**shared, "PET_NODE_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for number in range(2)
    ]
    said = outputs(pods, 240)
    assert [pod.returncode for pod in pods] == [0, 0], said
    for rank, text in enumerate(said):
        assert f"rank {rank} of 2 sum 1 ['--deepspeed_config', 'a b.json']" in text


def test_what_the_pods_start(tmp_path):
    assert started(read("deepspeed.yaml")["spec"]["trainer"]["command"], tmp_path)[0] == "train.py"
    words = started(read("megatron.yaml")["spec"]["trainer"]["command"], tmp_path)
    arguments = (ROOT / "configs" / "megatron" / "llama-3-8b.args").read_text().split()
    assert words[:3] == ["-m", "blockwise_lr.megatron", "Megatron-LM/pretrain_gpt.py"]
    assert words[3 : 3 + len(arguments)] == arguments and words[-1] == "--exit-signal-handler"
    (run,) = read("sweep.yaml")["spec"]["template"]["spec"]["containers"]
    for index, rate in enumerate(("3e-4", "6e-4", "1.2e-3", "2.4e-3")):
        words = started(run["command"], tmp_path, JOB_COMPLETION_INDEX=str(index))
        assert words[-4:] == ["--lr", rate, "--checkpoints", f"/checkpoints/{index}"]
