"""PBS (OpenPBS, PBS Pro): a copy of ``torchrun.pbs`` with the job in it, sent by qsub. Not run on a PBS yet."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ..blocks import BlockError
from .spec import Cluster, Job

FILE = Path(__file__).with_name("torchrun.pbs")
_SAVES_WITHIN = 600  # seconds before the end at which the ranks are asked to save


class PBS(Cluster):
    """A PBS cluster."""

    name = "pbs"

    def script(self, job: Job) -> str:
        """The job's file."""
        if job.container is not None:
            raise BlockError("--container is for slurm and kubernetes; under pbs, start the container in your script")
        select = f"select={job.nodes}:mpiprocs=1"
        select += f":ngpus={job.gpus}" if job.gpus else ""
        select += f":ncpus={job.cpus}" if job.cpus else ""
        head = [f"#PBS -N {job.name}", f"#PBS -l {select}", "#PBS -l place=scatter"]
        head += [f"#PBS -l walltime={job.time}"] if job.time else []
        head += [f"#PBS -J {job.array}"] if job.array else []
        head += [f"#PBS {option}" for option in job.options]
        before = 0 if job.seconds is None else max(job.seconds - _SAVES_WITHIN, 0)
        values = {
            "COMMAND": f"({shlex.join(job.command)})",
            "NPROC": str(job.processes_per_node),
            "BEFORE": str(before),
            "VENV": shlex.quote(job.venv),
        }
        text = FILE.read_text()
        for name, value in values.items():
            line = re.search(rf"^{name}=.*$", text, re.M)
            assert line is not None
            text = text[: line.start()] + f"{name}={value}" + text[line.end() :]
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.env.items())
        text = text.replace("\ncd ", f"\n{exports}\ncd ", 1)
        return text.replace("#PBS -r y\n", "\n".join(head) + "\n#PBS -r y\n", 1)

    def shown(self, job: Job) -> str:
        return f"qsub {job.name}.pbs\n\n# {job.name}.pbs\n{self.script(job)}"

    def send(self, job: Job) -> tuple[str, str]:
        self.run("qsub", "--version")  # before a file is left here
        file = Path.cwd() / f"{job.name}.pbs"
        file.write_text(self.script(job))
        number = self.run("qsub", str(file))
        return number, str(Path.cwd() / f"{job.name}.o{number.split('.')[0]}")

    def state(self, number: str) -> str:
        shown = self.run("qstat", "-x", "-f", number)
        found = re.search(r"job_state = (\w)", shown)
        words = {"Q": "PENDING", "R": "RUNNING", "F": "COMPLETED", "H": "HELD", "E": "EXITING"}
        return "unknown" if found is None else words.get(found[1], found[1])

    def cancel(self, number: str) -> None:
        self.run("qdel", number)
