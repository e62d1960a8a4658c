"""Errors of saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from .. import collective
from ..blocks.types import BlockError

Result = TypeVar("Result")


class CheckpointError(BlockError):
    """A checkpoint that is incomplete, damaged, of another layout or of a newer format; the message says what to do."""


class DamageError(CheckpointError):
    """A checkpoint whose files differ from those that were saved.

    Attributes:
        problems: one sentence per file.
    """

    def __init__(self, message: str, problems: Sequence[str]) -> None:
        super().__init__(message)
        self.problems = problems


class VersionError(CheckpointError):
    """A checkpoint of a newer format than this package reads."""


class MismatchError(CheckpointError):
    """A checkpoint of another model or other settings; the message says what differs and how to accept it."""


def raise_on_all_ranks(error: Exception | None, what: str = "loading") -> None:
    """:func:`~blockwise_lr.collective.errors.raise_on_all_ranks` with CheckpointError."""
    collective.errors.raise_on_all_ranks(error, what, CheckpointError)


def run_on_all_ranks(act: Callable[[], Result], what: str = "loading") -> Result:
    """:func:`~blockwise_lr.collective.errors.run_on_all_ranks` with CheckpointError."""
    return collective.errors.run_on_all_ranks(act, what, CheckpointError)
