"""Raising the same error on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..blocks.types import BlockError
from .roll_call import is_of_a_collective

Result = TypeVar("Result")


def raise_on_all_ranks(error: Exception | None, what: str, error_type: type[BlockError] = BlockError) -> None:
    """Raises on every rank if any rank has an error, so that no rank enters the next collective alone. Collective.

    Ranks without an error raise one with the text of the lowest failed rank. Without torch.distributed, raises this
    process's error. Calls may be nested: an error already raised on all ranks is re-raised without communication, and so is one
    of a collective, for the next would fail as it did.

    Args:
        error: this rank's error, or None.
        what: what the ranks were doing, for the message on ranks without an error.
        error_type: the type of error these ranks raise.

    Raises:
        Exception: ``error`` itself, or an ``error_type`` if the ranks' errors differ.
    """
    if not dist.is_initialized() or getattr(error, "raised_on_all_ranks", False) or is_of_a_collective(error):
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
        error = error_type(
            f"{what} failed on rank{'s' if len(failed) > 1 else ''} {ranks} of {len(texts)}; "
            f"rank {first}: {failed[first]}"
        )
    error.raised_on_all_ranks = True  # type: ignore[attr-defined]  # an attribute of ours on any exception
    raise error


def run_on_all_ranks(act: Callable[[], Result], what: str, error_type: type[BlockError] = BlockError) -> Result:
    """Calls ``act`` on this rank and raises on all ranks if it raised on any. Collective.

    Args:
        act: this rank's part; must not contain collectives, in which other ranks would hang if it failed.
        what, error_type: as for :func:`raise_on_all_ranks`.

    Returns:
        What ``act`` returned on this rank.
    """
    try:
        result = act()
    except Exception as problem:  # any type: the other ranks must be told
        raise_on_all_ranks(problem, what, error_type)
        raise AssertionError("an error was given and not raised") from problem
    raise_on_all_ranks(None, what, error_type)
    return result


def is_rank_zero() -> bool:
    """Whether this process has global rank 0, or torch.distributed is not initialized."""
    return not dist.is_initialized() or dist.get_rank() == 0
