"""Kubernetes: a TrainJob of Kubeflow Trainer v2, whose torch runtime starts torchrun's agents and restarts the whole job."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from ..blocks import BlockError
from .spec import Cluster, Job

RUNTIME = "torch-distributed"  # the ClusterTrainingRuntime that Kubeflow Trainer installs


class Kubernetes(Cluster):
    """A Kubernetes cluster with Kubeflow Trainer v2."""

    name = "kubernetes"

    def manifest(self, job: Job) -> dict[str, Any]:
        """The TrainJob."""
        if job.container is None:
            raise BlockError("a Kubernetes job runs in a container; give --container IMAGE")
        if job.array is not None:
            raise BlockError("--array is for slurm and pbs; send one job each here")
        limits = {"nvidia.com/gpu": job.gpus} if job.gpus else {}
        limits.update({"cpu": job.cpus} if job.cpus else {})
        # USR1 would kill torchrun; on SIGTERM, which Kubernetes sends, it asks its ranks, which save and leave
        words = f"exec torchrun {shlex.join(job.command)}"
        activate = f"source {shlex.quote(job.venv)}/bin/activate && " if job.venv else ""
        trainer = {
            "image": job.container,
            "numNodes": job.nodes,
            "numProcPerNode": job.processes_per_node,
            "command": ["bash", "-c", activate + words],
            "env": [{"name": name, "value": value} for name, value in job.env.items()],
            "resourcesPerNode": {"limits": limits, "requests": limits},
        }
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.name},
            "spec": {"runtimeRef": {"name": RUNTIME}, "trainer": trainer},
        }

    def shown(self, job: Job) -> str:
        return f"{shlex.join(self._words(job))} -f - <<'END'\n{json.dumps(self.manifest(job), indent=1)}\nEND\n"

    def send(self, job: Job) -> tuple[str, str]:
        manifest = self.manifest(job)
        manifest["metadata"]["name"] = f"{job.name}-{time.strftime('%m%d-%H%M%S')}"
        self.run(*self._words(job), "-f", "-", text=json.dumps(manifest))
        return manifest["metadata"]["name"], ""

    def state(self, number: str) -> str:
        shown = json.loads(self.run("kubectl", "get", "trainjob", number, "-o", "json"))
        true = [one["type"] for one in shown.get("status", {}).get("conditions", []) if one.get("status") == "True"]
        return true[-1].upper() if true else "RUNNING"

    def cancel(self, number: str) -> None:
        self.run("kubectl", "delete", "trainjob", number)

    def log(self, number: str, log: str) -> str:
        return self.run("kubectl", "logs", "-l", f"jobset.sigs.k8s.io/jobset-name={number}", "--prefix", "--tail", "-1")

    def _words(self, job: Job) -> list[str]:
        return ["kubectl", "create", *job.options]
