"""Which run a folder of checkpoints belongs to: only the newest may write there, and one that makes no progress stops.

After a node is lost, a cluster starts the job again elsewhere while processes on the lost node may live on. Every run
therefore puts a token of its own into the folder when it starts, and looks for it before each save.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from .errors import CheckpointError
from .files import is_seen, make_folder, write_atomically

FILE = "blockwise_lr_run.json"


class Owner(BaseModel):
    """The run that a folder belongs to.

    Attributes:
        token: its own.
        job: the scheduler's name for it, equal for all of its restarts; empty without a scheduler.
        restart: how often the scheduler has started it again.
        host: where its first rank runs.
        step: the optimizer step it has started from; None before it knows.
        starts: how many starts of this job in a row were from this step.
    """

    token: str
    job: str = ""
    restart: int = 0
    host: str = ""
    step: int | None = None
    starts: int = 1

    def __str__(self) -> str:
        job = f"{self.job}, restart {self.restart}, " if self.job else ""
        return f"{job}on {self.host}"


def this_run(token: str, environment: Mapping[str, str] = os.environ) -> Owner:
    """What the scheduler says of this process's run (Slurm; a Kubernetes job by JOB_NAME)."""
    job, restart = "", 0
    if "SLURM_JOB_ID" in environment:
        job = f"Slurm job {environment['SLURM_JOB_ID']}"
        restart = int(environment.get("SLURM_RESTART_COUNT", "0") or 0)
    elif "JOB_NAME" in environment:
        job = f"job {environment['JOB_NAME']}"
    return Owner(token=token, job=job, restart=restart, host=socket.gethostname())


def owner_of(directory: str | os.PathLike) -> Owner | None:
    """The run that a folder belongs to; None where none has claimed it.

    Raises:
        CheckpointError: the file that says so cannot be read.
    """
    file = Path(directory) / FILE
    try:
        return Owner.model_validate_json(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); remove it where no run writes to {directory}"
        ) from error


def claim(directory: str | os.PathLike, mine: Owner) -> Owner | None:
    """Makes a folder this run's; returns whose it was. Called by one rank."""
    make_folder(directory)
    before = owner_of(directory)
    _write(directory, mine)
    return before


def count_start(directory: str | os.PathLike, mine: Owner, before: Owner | None, step: int, most: int) -> None:
    """Notes from which step a run starts, and refuses a job's start that has been tried too often. Called by one rank.

    Args:
        before: what :func:`claim` has returned.
        step: the optimizer step of the checkpoint it goes on from, 0 without one.
        most: starts of one job in a row from the same step.

    Raises:
        CheckpointError: this would be one more.
    """
    again = before is not None and before.job == mine.job and before.step == step
    starts = (before.starts if again and before is not None else 0) + 1
    if starts > most:
        raise CheckpointError(
            f"{mine.job or 'this run'} has started {starts - 1} times from step {step} in {directory} and ended before it "
            f"saved anything newer; see its log for the error that it ends with each time, mend that, and remove "
            f"{Path(directory) / FILE} to start again"
        )
    _write(directory, mine.model_copy(update={"step": step, "starts": starts}))


def find_claim(directory: str | os.PathLike, token: str, patience: float) -> None:
    """Waits until the claim is seen here, on a file system that shows new files after a while.

    Raises:
        CheckpointError: it is not.
    """

    def claimed() -> bool:
        found = owner_of(directory)
        return found is not None and found.token == token

    if not is_seen(claimed, patience):
        raise CheckpointError(
            f"{directory} does not show what rank 0 has written to {FILE} there; give all ranks the same folder, on a "
            f"file system that all nodes share"
        )


def refuse_if_lost(directory: str | os.PathLike, mine: Owner) -> None:
    """Raises CheckpointError where a folder belongs to another run by now."""
    now = owner_of(directory)
    if now is None or now.token != mine.token:
        whose = "is no run's any more" if now is None else f"has been taken over by another run ({now})"
        raise CheckpointError(
            f"{directory} {whose}, so this run ({mine}) may not save there; end it, or give it a folder of its own"
        )


def _write(directory: str | os.PathLike, owner: Owner) -> None:
    write_atomically(Path(directory) / FILE, owner.model_dump_json() + "\n")
