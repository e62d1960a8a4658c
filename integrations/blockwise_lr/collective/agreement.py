"""What must be equal on the ranks that share parameters, compared once while something is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ..blocks.types import BlockError


def same_on_all_ranks(
    groups: Sequence[dist.ProcessGroup], build: Callable[[], None], describe: Callable[[], Mapping[str, Any]], what: str
) -> None:
    """Builds something on all ranks of some groups and compares what came of it: a digest per group, and where digests
    differ what they are of.

    Args:
        groups: process groups of this rank whose members all call this; none: just build.
        build: this rank's part; it holds no collective that the others would wait in.
        describe: what must be equal, as a flat mapping; asked where building succeeded.
        what: what is being built, for the error.

    Raises:
        BlockError: building failed on a rank, or two ranks differ; on all ranks of the group.
    """
    error: Exception | None = None
    try:
        build()
    except Exception as problem:
        if not groups:
            raise
        error = problem
    mine = (None if error is None else f"{type(error).__name__}: {error}", dict(describe()) if error is None else {})
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).hexdigest()
    for group in groups:
        if len(set(_gathered(digest, group))) == 1:
            if error is not None:
                raise error
            continue
        text = _problem(_gathered(mine, group), dist.get_process_group_ranks(group), what)
        raise BlockError(text) from error


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, value, group=group)
    return answers


def _problem(answers: Sequence[tuple[str | None, Mapping[str, Any]]], ranks: Sequence[int], what: str) -> str:
    failed = [(rank, text) for rank, (text, _) in zip(ranks, answers) if text is not None]
    if failed:
        return f"{what} failed on rank {', '.join(str(rank) for rank, _ in failed)}: {failed[0][1]}"
    first = answers[0][1]
    for rank, (_, other) in zip(ranks, answers):
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                return (
                    f"{what}: rank {ranks[0]} and rank {rank} differ in {_where(key, first.get(key), other.get(key))}; "
                    f"build the same model and optimizer on all ranks"
                )
    raise AssertionError("ranks with different digests say the same")


def _where(key: str, one: Any, other: Any) -> str:
    """The innermost place at which two plain values differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        name = next(name for name in {**one, **other} if one.get(name) != other.get(name))
        return _where(f"{key}.{name}", one.get(name), other.get(name))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        number = next(number for number, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
        return _where(f"{key}[{number}]", one[number], other[number])
    return f"{key}: {one!r} and {other!r}"
