"""Megatron's own way to save and leave on a signal, composed with a scheduler that sends SIGUSR1 and starts the job again.

With ``--exit-signal-handler`` Megatron takes SIGTERM: all ranks agree on the iteration, save and leave with 0. torchrun
cannot be sent that signal, for it ends its ranks; so a cluster asks them by SIGUSR1 (Slurm's ``--signal=USR1@300``), which
torchrun is told to ignore and a rank hands on to itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..jobs.requeue import EXIT_PREEMPTED, requeue

FLAG = "--exit-signal-handler"


@contextmanager
def requeued_when_asked(arguments: Sequence[str]) -> Iterator[None]:
    """Runs a training script that may be asked by SIGUSR1 to save and leave, where its flags have Megatron do so.

    Args:
        arguments: the script's.

    Raises:
        SystemExit: the script was asked and has left: on rank 0 with 0 where Slurm starts the job again, else with
            EXIT_PREEMPTED, which torchrun takes for a failure of the job.
    """
    if FLAG not in arguments or "--exit-signal" in arguments:
        yield
        return
    asked = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if (
            signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        ):  # else Megatron has not begun, and there is nothing to save
            asked = True
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGUSR1, hand_on)
    try:
        yield
    except SystemExit as left:
        if left.code not in (None, 0):
            raise
    finally:
        signal.signal(signal.SIGUSR1, before)
    if asked and os.environ.get("RANK", "0") == "0":
        sys.exit(0 if requeue() else EXIT_PREEMPTED)
