"""How errors end a user's script that a runner of ours runs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from . import roll_call


@contextmanager
def errors_in_a_sentence(runner: str, *errors: type[Exception]) -> Iterator[None]:
    """Ends with an error's sentence, the rank and the script's line, and no traceback; of an error of all ranks alike, once on
    each node.

    Under torchrun each rank's traceback is some sixty lines of PyTorch's, DeepSpeed's and ours. A collective's error ends it
    with the ranks that are missing, once on each node; any other error is told to the other ranks, and goes on (see
    ``roll_call``).

    Args:
        runner: whose name stands before it.
        errors: the types this is for.

    Raises:
        SystemExit: one of the errors or a collective's, as exit code 1.
    """
    roll_call.enable()
    try:
        yield
    except errors as error:
        is_everyones = getattr(error, "raised_on_all_ranks", False)
        if not is_everyones or os.environ.get("LOCAL_RANK", "0") == "0":
            _write(runner, str(error), error)
        if not is_everyones:
            _write(runner, roll_call.tell(error), error)
        sys.exit(1)
    except Exception as error:
        found = roll_call.tell(error)
        if not (roll_call.is_of_a_collective(error) and dist.is_initialized()):
            raise
        _write(runner, found, error)
        sys.exit(1)


def _write(runner: str, text: str | None, error: Exception) -> None:
    """One write, so that ranks' lines do not run together; none of None."""
    if text is not None:
        sys.stderr.write(f"{runner}{_rank()}: {text}{_where(error)}\n")
        sys.stderr.flush()


def _rank() -> str:
    return f", rank {os.environ['RANK']}" if "RANK" in os.environ else ""


def _where(error: Exception) -> str:
    """The line of the script that led to it, if runpy runs one."""
    frames = traceback.extract_tb(error.__traceback__)
    last = max((number for number, frame in enumerate(frames) if "runpy" in frame.filename), default=len(frames))
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in frames[last + 1 : last + 2])
