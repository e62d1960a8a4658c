"""A job, a site's defaults, and what every kind of cluster can do with a job."""

from __future__ import annotations

import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tomllib

from ..blocks import BlockError
from ..rules.options import did_you_mean

_TIME = re.compile(r"^(?:(\d+)-)?(\d{1,3}):(\d\d)(?::(\d\d))?$")
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?$")


@dataclass(frozen=True)
class Job:
    """A torchrun job.

    Attributes:
        command: a training script and its arguments, or ``-m`` and a module, as torchrun takes them.
        nodes, processes: of the job, and of a node (its GPUs by default).
        gpus, cpus: of a node; no CPUs: what the cluster gives.
        time: ``[days-]hours:minutes[:seconds]``; None: what the cluster gives.
        name: of the job: lower case letters, digits and dashes.
        array: numbers of an array job, as in ``0-3`` or ``0-7%2``.
        container: an image: Slurm's pyxis, or Kubernetes.
        env: more variables of the environment.
        venv: the virtual environment on the nodes; "": what PATH has.
        options: further words for the cluster's own command.

    Raises:
        BlockError: a number, time or name that no cluster takes.
    """

    command: Sequence[str]
    nodes: int = 1
    gpus: int = 8
    processes: int | None = None
    cpus: int | None = None
    time: str | None = None
    name: str = "blockwise"
    array: str | None = None
    container: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    venv: str = ".venv"
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.command:
            raise BlockError(
                "there is nothing to run; write it behind --, as in -- train.py --deepspeed_config ds.json"
            )
        for name, value, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus, 0),
            ("--processes-per-node", self.processes, 1),
            ("--cpus-per-node", self.cpus, 1),
        ):
            if value is not None and value < least:
                raise BlockError(f"{name} is {value}; give {least} or more")
        if not self.gpus and self.processes is None:
            raise BlockError("--gpus-per-node is 0; say how many processes a node runs, by --processes-per-node")
        if self.time is not None and not _TIME.match(self.time):
            raise BlockError(
                f"--time is {self.time!r}; write hours:minutes:seconds, as in 24:00:00, or days-hours:minutes:seconds"
            )
        if not _NAME.match(self.name):
            raise BlockError(f"--name is {self.name!r}; use lower case letters, digits and dashes, at most 52")

    @property
    def processes_per_node(self) -> int:
        """How many ranks a node runs."""
        return self.gpus if self.processes is None else self.processes

    @property
    def seconds(self) -> int | None:
        """The time in seconds."""
        if self.time is None:
            return None
        found = _TIME.match(self.time)
        assert found is not None  # checked above
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Cluster(ABC):
    """How one kind of cluster is told of a job. Methods that run its commands raise BlockError with what these say."""

    name: ClassVar[str]

    @abstractmethod
    def shown(self, job: Job) -> str:
        """What would be sent, for a human."""

    @abstractmethod
    def send(self, job: Job) -> tuple[str, str]:
        """Sends a job; returns its number or name, and where it logs."""

    @abstractmethod
    def state(self, number: str) -> str:
        """A word on a job that was sent."""

    @abstractmethod
    def cancel(self, number: str) -> None:
        """Ends a job."""

    def log(self, number: str, log: str) -> str:
        """What it has printed so far."""
        file = Path(log)
        if not file.exists():
            raise BlockError(f"job {number} has no log at {log} yet")
        return file.read_text(errors="replace")

    def run(self, *words: str, text: str | None = None, env: Mapping[str, str] | None = None) -> str:
        """What one of the cluster's commands prints.

        Raises:
            BlockError: it is not installed, or it fails.
        """
        if shutil.which(words[0]) is None:
            raise BlockError(f"{words[0]} is not installed here; submit from a node of the cluster, or see --dry-run")
        done = subprocess.run(words, input=text, capture_output=True, text=True, env=None if env is None else dict(env))
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise BlockError(f"{words[0]} refuses: {said[-1] if said else f'exit code {done.returncode}'}")
        return done.stdout.strip()


_KEYS = {"nodes", "gpus", "processes", "cpus", "time", "container", "venv", "env", "options"}


def read_site(path: Path | None, cluster: str) -> dict[str, Any]:
    """A site's defaults of a cluster: the table of its name in a TOML file.

    Raises:
        BlockError: the file cannot be read, or has a key that no job has.
    """
    if path is None:
        return {}
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BlockError(f"--site {path} cannot be read: {error}") from None
    found = tables.get(cluster, {})
    if not isinstance(found, dict):
        raise BlockError(f"--site {path}: {cluster} is no table; write [{cluster}]")
    for key in found:
        if key not in _KEYS:
            raise BlockError(
                f"--site {path}: unknown key {key!r}{did_you_mean(key, _KEYS)}; the valid ones are {', '.join(sorted(_KEYS))}"
            )
    return found
