"""Errors of saving and loading, and how all ranks come to raise the same one."""
from __future__ import annotations

import torch.distributed as dist

from ..blocks.types import BlockError


class CheckpointError(BlockError):
    """A checkpoint that is incomplete, damaged, of another layout or of a newer format; the message says how to go on."""


class MismatchError(CheckpointError):
    """A checkpoint that contradicts the running model or settings; the message says what differs and what to pass."""


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank of a group where any of them has an error, so that none goes on alone into a collective.

    A rank without an error of its own raises the first one's text. Without torch.distributed it just raises.

    Args:
        error: this rank's error, or None.
        group: the ranks that call this; the default group where None.
    """
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    failed = {rank: text for rank, text in enumerate(texts) if text is not None}
    if not failed:
        return
    if error is not None and len(set(failed.values())) == 1 and len(failed) == len(texts):
        raise error
    first = next(iter(failed))
    kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
    ranks = ", ".join(map(str, failed))
    raise kind(f"loading failed on rank{'s' if len(failed) > 1 else ''} {ranks} of {len(texts)}; rank {first}: "
               f"{failed[first].partition(': ')[2]}") from error


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0
