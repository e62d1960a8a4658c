"""Errors of saving and loading, and how all ranks come to raise the same one."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from ..blocks.types import BlockError

Result = TypeVar("Result")


class CheckpointError(BlockError):
    """A checkpoint that is incomplete, damaged, of another layout or of a newer format; the message says how to go on."""


class DamageError(CheckpointError):
    """A checkpoint whose files are not what was saved.

    Attributes:
        problems: what is wrong, file by file.
    """

    def __init__(self, message: str, problems: Sequence[str]) -> None:
        super().__init__(message)
        self.problems = problems


class VersionError(CheckpointError):
    """A checkpoint of a newer format than this package reads."""


class MismatchError(CheckpointError):
    """A checkpoint that contradicts the running model or settings; the message says what differs and what to pass."""


def raise_together(error: Exception | None, what: str = "loading") -> None:
    """Raises on every rank where any of them has an error, so that none goes on alone into a collective.

    A rank without an error of its own raises the first one's text. Without torch.distributed it just raises. Calls may
    be nested: an error that all ranks have raised together is passed on without asking them again.

    Args:
        error: this rank's error, or None.
        what: what all ranks were doing, for those that had no error.
    """
    if not dist.is_initialized() or getattr(error, "raised_together", False):
        if error is not None:
            raise error
        return
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}")
    failed = {rank: text for rank, text in enumerate(texts) if text is not None}
    if not failed:
        return
    if error is None or len(set(failed.values())) > 1 or len(failed) < len(texts):
        first = next(iter(failed))
        ranks = ", ".join(map(str, failed))
        error = CheckpointError(f"{what} failed on rank{'s' if len(failed) > 1 else ''} {ranks} of {len(texts)}; "
                                f"rank {first}: {failed[first]}")
    error.raised_together = True
    raise error


def together(act: Callable[[], Result], what: str = "loading") -> Result:
    """Does this rank's part of something; where that fails on any rank, with whatever error, all ranks raise.

    Args:
        act: this rank's part; it holds no collective that the others would wait in.
        what: as for :func:`raise_together`.
    """
    result, error = None, None
    try:
        result = act()
    except Exception as problem:  # whatever it is, the other ranks have to hear of it
        error = problem
    raise_together(error, what)
    return result


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0
