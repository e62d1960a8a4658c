"""Slurm: its own sbatch, squeue and scancel around ``torchrun.sbatch``, which the tests run on a real one."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from ..blocks import BlockError
from .spec import Cluster, Job

FILE = Path(__file__).with_name("torchrun.sbatch")


class Slurm(Cluster):
    """A Slurm cluster."""

    name = "slurm"

    def words(self, job: Job) -> list[str]:
        """The command line of sbatch."""
        output = "%x-%A_%a.log" if job.array else "%x-%j.log"
        found = ["sbatch", "--parsable", f"--job-name={job.name}", f"--nodes={job.nodes}", f"--output={output}"]
        found.append(f"--gpus-per-node={job.gpus}")
        found += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
        found += [f"--time={job.time}"] if job.time else []
        found += [f"--array={job.array}"] if job.array else []
        return [*found, *job.options, str(FILE), *job.command]

    def environment(self, job: Job) -> dict[str, str]:
        """What the file reads, and the job's own variables; sbatch takes the environment along."""
        found = {"VENV": job.venv, **job.env}
        if job.processes is not None:
            found["NPROC"] = str(job.processes)
        if job.container is not None:
            mounts = f" --container-mounts={os.getcwd()} --container-workdir={os.getcwd()}"
            found["SRUN_OPTIONS"] = f"--container-image={job.container}{mounts}"
        return found

    def shown(self, job: Job) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment(job).items()]
        return " ".join([*variables, shlex.join(self.words(job))]) + f"\n\n# {FILE.name}\n{FILE.read_text()}"

    def send(self, job: Job) -> tuple[str, str]:
        self._refuse_what_would_pend(job)
        number = self.run(*self.words(job), env={**os.environ, **self.environment(job)}).split(";")[0]
        log = f"{job.name}-{number}_*.log" if job.array else f"{job.name}-{number}.log"
        return number, str(Path.cwd() / log)

    def state(self, number: str) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        states = [word.split("=", 1)[1] for word in shown.split() if word.startswith("JobState=")]
        return ", ".join(dict.fromkeys(states)) or "unknown"

    def cancel(self, number: str) -> None:
        self.run("scancel", number)

    def log(self, number: str, log: str) -> str:
        if "*" not in log:
            return super().log(number, log)
        files = sorted(Path(log).parent.glob(Path(log).name))
        if not files:
            raise BlockError(f"job {number} has no log at {log} yet")
        return "".join(f"==> {file.name} <==\n{file.read_text(errors='replace')}" for file in files)

    def _refuse_what_would_pend(self, job: Job) -> None:
        """A job that asks for more than any node has waits for ever, without a word."""
        if shutil.which("sinfo") is None:
            return
        nodes = [line.split() for line in self.run("sinfo", "--noheader", "--Node", "--format=%N %c").splitlines()]
        most = {name: int(cpus.rstrip("+")) for name, cpus in nodes}
        if most and job.nodes > len(most):
            raise BlockError(f"--nodes is {job.nodes} and the cluster has {len(most)}")
        asked = job.cpus or 64  # what the file asks for
        if most and asked > max(most.values()):
            raise BlockError(
                f"a node of this cluster has at most {max(most.values())} CPUs and the job asks for {asked}, so that it would "
                f"wait for ever; give --cpus-per-node"
            )
