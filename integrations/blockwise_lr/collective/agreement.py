"""What must be equal on ranks is compared while something is built: digests first, and what they are of where they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..blocks.types import BlockError

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """The innermost place at which ranks differ.

    Attributes:
        place: where, as ``block_lr_ratios.qk`` or ``betas[1]``.
        values: what each rank has there, by rank.
    """

    place: str
    values: Mapping[int, Any]

    def told(self, show: Callable[[Any], str] = str, absent: str = "unset") -> str:
        """The values and who has them, as in "0.1 on ranks 0-2 and unset on rank 3"."""
        found: dict[str, list[int]] = {}
        for rank, value in self.values.items():
            found.setdefault(absent if value is _ABSENT else show(value), []).append(rank)
        return " and ".join(f"{value} on rank{'s' if len(at) > 1 else ''} {ranges(at)}" for value, at in found.items())

    def two(self) -> tuple[tuple[int, str], tuple[int, str]]:
        """The first rank, and the first that differs from it, with what they have."""
        shown = {rank: "nothing" if value is _ABSENT else repr(value) for rank, value in self.values.items()}
        first = next(iter(shown.items()))
        return first, next(item for item in shown.items() if item[1] != first[1])


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in the group's order; without torch.distributed this process's alone. Collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, value, group=group)
    return answers


def find_difference(
    mine: Mapping[str, Any], *, group: dist.ProcessGroup | None = None, peers: Sequence[int] | None = None
) -> Difference | None:
    """The first difference between what ranks say; None where they say the same. Collective, the same on all ranks.

    Args:
        mine: what this rank says: texts, numbers, and mappings and lists of them.
        group: the ranks; all of them by default.
        peers: those of the group (by their global ranks) that must say the same as this one, itself among them; all by
            default. All ranks hear of a difference between any that are each other's peers.
    """
    answers = _details_where_unlike(mine, group, peers)
    return None if answers is None else next(filter(None, (first_difference(alike) for alike in answers)), None)


def first_difference(answers: Mapping[int, Mapping[str, Any]]) -> Difference | None:
    """The same of what has been gathered, by rank."""
    found = _innermost("", list(answers.values()))
    return None if found is None else Difference(found[0], dict(zip(answers, found[1], strict=True)))


def same_on_all_ranks(
    groups: Sequence[dist.ProcessGroup], build: Callable[[], None], describe: Callable[[], Mapping[str, Any]], what: str
) -> None:
    """Builds something on all ranks of some groups and compares what came of it.

    Args:
        groups: process groups of this rank whose members all call this; none: just build.
        build: this rank's part; it holds no collective that the others would wait in.
        describe: what must be equal, as a mapping of plain values; asked where building succeeded.
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
    for group in groups:
        answers = _details_where_unlike(mine, group, None)
        if answers is None:
            if error is not None:
                raise error
            continue
        failed = {rank: text for rank, (text, _) in answers[0].items() if text is not None}
        if failed:
            told = f"failed on rank {', '.join(map(str, failed))}: {next(iter(failed.values()))}"
            raise BlockError(f"{what} {told}") from error
        difference = first_difference({rank: described for rank, (_, described) in answers[0].items()})
        assert difference is not None, "ranks with different digests say the same"
        (one, here), (other, there) = difference.two()
        raise BlockError(
            f"{what}: rank {one} and rank {other} differ in {difference.place}: {here} and {there}; "
            f"build the same model and optimizer on all ranks"
        )


def _details_where_unlike(
    mine: Any, group: dist.ProcessGroup | None, peers: Sequence[int] | None
) -> list[dict[int, Any]] | None:
    """What ranks say, by rank, for each set of peers; None where all peers' digests are equal. Collective."""
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).hexdigest()
    answers = gathered((None if peers is None else tuple(peers), digest), group)
    ranks = range(len(answers)) if group is None else dist.get_process_group_ranks(group)
    sets: dict[Any, list[int]] = {}
    for number, (theirs, _) in enumerate(answers):
        sets.setdefault(theirs, []).append(number)
    if all(answers[number][1] == answers[members[0]][1] for members in sets.values() for number in members):
        return None
    details = gathered(mine, group)
    return [{ranks[number]: details[number] for number in members} for members in sets.values()]


def _innermost(place: str, values: list[Any]) -> tuple[str, list[Any]] | None:
    """The innermost place at which plain values differ, and what they are there; None where they are equal."""
    if all(value is values[0] or value == values[0] for value in values):
        return None
    inside: list[tuple[str, list[Any]]] = []
    if all(isinstance(value, Mapping) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        inside = [
            (f"{place}.{name}" if place else str(name), [value.get(name, _ABSENT) for value in values])
            for name in names
        ]
    elif all(isinstance(value, (list, tuple)) for value in values) and len({len(value) for value in values}) == 1:
        inside = [(f"{place}[{number}]", list(items)) for number, items in enumerate(zip(*values))]
    return next(filter(None, (_innermost(*pair) for pair in inside)), (place, values))


def ranges(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, as in "0-2, 5"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
