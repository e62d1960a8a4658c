"""How all ranks come to raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..blocks.types import BlockError

Result = TypeVar("Result")


def raise_on_all_ranks(error: Exception | None, what: str, error_type: type[BlockError] = BlockError) -> None:
    """Raises on every rank where any of them has an error, so that none goes on alone into a collective.

    A rank without an error of its own raises the first one's text. Without torch.distributed it just raises. Calls may
    be nested: an error that all ranks have raised is passed on without asking them again.

    Args:
        error: this rank's error, or None.
        what: what all ranks were doing, for those that had no error.
        error_type: what these raise.
    """
    if not dist.is_initialized() or getattr(error, "raised_on_all_ranks", False):
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
    error.raised_on_all_ranks = True  # type: ignore[attr-defined]
    raise error


def run_on_all_ranks(act: Callable[[], Result], what: str, error_type: type[BlockError] = BlockError) -> Result:
    """Does this rank's part of something; where that fails on any rank, with whatever error, all ranks raise.

    Args:
        act: this rank's part; it holds no collective that the others would wait in.
        what, error_type: as for :func:`raise_on_all_ranks`.
    """
    try:
        result = act()
    except Exception as problem:  # whatever it is, the other ranks have to hear of it
        raise_on_all_ranks(problem, what, error_type)
        raise AssertionError("an error was given and not raised") from problem
    raise_on_all_ranks(None, what, error_type)
    return result


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0
