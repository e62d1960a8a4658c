"""Having the scheduler start a job again that has saved and leaves."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess

log = logging.getLogger("blockwise_lr")

EXIT_PREEMPTED = 85  # for schedulers that start a failed job again


def requeue() -> bool:
    """Has Slurm start this job again; False where this is no Slurm job, or it is not to be requeued. For one rank to call."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("scontrol requeue %s: %s", job, error)
        return False
    if done.returncode:
        log.warning("scontrol requeue %s: %s (submit with --requeue)", job, done.stderr.strip())
    return done.returncode == 0
