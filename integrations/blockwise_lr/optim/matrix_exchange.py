"""Matrices that lie in parts on several ranks: brought to one of these ranks each, and back.

Who owns which matrix follows from the shard map alone, so ranks agree on it without talking. Only ranks that hold parts of a
matrix send or receive for it, all pieces between two ranks in one message, in bfloat16: the precision in which matrices are
orthogonalized, so that nothing is lost on the way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..blocks import ParamLayout
from ..plan.shards import ShardMap

# elements of the matrices that one rank owns in a round: what bounds the memory of a step (64 MiB in bfloat16)
ROUND = 1 << 25


@dataclass(frozen=True)
class Spread:
    """Where the parts of one flat array lie.

    Attributes:
        name: the array's.
        group: the ranks.
        parts: (rank of the group, start, elements), in order; at most one of each rank.
        owner: the rank that the whole array is brought to, one of those with parts.
    """

    name: str
    group: ProcessGroup | None
    parts: tuple[tuple[int, int, int], ...]
    owner: int

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return sum(numel for _, _, numel in self.parts)


@dataclass(frozen=True)
class Route:
    """The way of one matrix: from shards to a slice, from tensor-parallel slices to the whole; None: there is but one part.

    Attributes:
        name: the parameter.
        shards: of this rank's slice, or of the whole parameter.
        slices: of the whole, slice after slice.
        axis: along which the slices follow one another, counted in the slice.
    """

    name: str
    shards: Spread | None = None
    slices: Spread | None = None
    axis: int = 0


def rounds_of(shards: ShardMap, layouts: Mapping[str, ParamLayout]) -> list[tuple[Route, ...]]:
    """The routes of all matrices that no rank holds whole, in rounds whose memory is bounded; the same on all ranks.

    Args:
        layouts: of the matrices, as this rank has them (of its slices).
    """
    lanes: dict[tuple[ProcessGroup | None, ProcessGroup | None], list[str]] = defaultdict(list)
    for name in dict.fromkeys([*shards.boundaries, *shards.slices]):
        if name in layouts:
            cut, split = shards.boundaries.get(name), shards.slices.get(name)
            lanes[cut.group if cut else None, split.group if split else None].append(name)
    return [found for names in lanes.values() for found in _rounds(names, shards, layouts)]


def _rounds(names: Sequence[str], shards: ShardMap, layouts: Mapping[str, ParamLayout]) -> Iterator[tuple[Route, ...]]:
    """Of matrices that lie over the same groups. Each goes to the rank that has had the least work so far."""
    work: dict[tuple[int, int], float] = defaultdict(float)
    filled: dict[tuple[int, int], int] = defaultdict(int)
    found: list[Route] = []
    for name in names:
        layout, cut, split = layouts[name], shards.boundaries.get(name), shards.slices.get(name)
        parts = cut.parts(layout.numel) if cut else ((0, 0, layout.numel),)
        slices = dist.get_world_size(split.group) if split else 1
        mine = {rank: sum(work[rank, other] for other in range(slices)) for rank, _, _ in parts}
        first = min(mine, key=lambda rank: (mine[rank], rank))
        second = min(range(slices), key=lambda rank: (work[first, rank], rank))
        work[first, second] += slices * layout.numel * min(layout.outputs, layout.inputs)
        if found and filled[first, second] + slices * layout.numel > ROUND:
            yield tuple(found)
            found, filled = [], defaultdict(int)
        filled[first, second] += slices * layout.numel
        whole = tuple((rank, rank * layout.numel, layout.numel) for rank in range(slices))
        found.append(
            Route(
                name,
                Spread(name, cut.group, parts, first) if cut else None,
                Spread(name, split.group, whole, second) if split else None,
                split.axis if split else 0,
            )
        )
    if found:
        yield tuple(found)


def exchanged(
    routes: Sequence[Route],
    parts: Mapping[str, torch.Tensor],
    work: Callable[[Route, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Has every matrix worked on by one rank. All ranks that hold parts of the matrices call it, with the same of them.

    Args:
        routes: of matrices that this rank has parts of.
        parts: name -> this rank's part, flat, bfloat16.
        work: takes a whole matrix, flat and slice after slice, and returns as much.

    Returns:
        Name -> this rank's part of what ``work`` made.
    """
    by_name = {route.name: route for route in routes}
    shards, slices = [route.shards for route in routes], [route.slices for route in routes]
    held = _brought(shards, parts)
    whole = _brought([by_name[name].slices for name in held], held)
    made = {name: work(by_name[name], matrix) for name, matrix in whole.items()}
    del whole
    return _returned(shards, _returned([of for of in slices if of is None or of.name in held], made, held), parts)


def _brought(spreads: Sequence[Spread | None], parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole arrays that this rank owns; of those that are not spread, the part."""
    found = dict(parts)
    for group, of_group in _by_group(spreads).items():
        rank = dist.get_rank(group)
        for of in of_group:
            del found[of.name]
            if of.owner == rank:
                found[of.name] = parts[of.name].new_empty(of.numel)
        moves = [
            _Move(source, of.owner, parts.get(of.name), found.get(of.name), start, numel, reads_whole=False)
            for of in of_group
            for source, start, numel in of.parts
        ]
        _run(group, rank, moves)
    return found


def _returned(
    spreads: Sequence[Spread | None], wholes: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """This rank's parts of arrays that their owners have; ``parts`` say of what size and kind they are."""
    found = dict(wholes)
    for group, of_group in _by_group(spreads).items():
        rank, moves = dist.get_rank(group), []
        for of in of_group:
            whole, part = wholes.get(of.name), torch.empty_like(parts[of.name])
            found[of.name] = part
            moves += [_Move(of.owner, to, whole, part, start, numel, reads_whole=True) for to, start, numel in of.parts]
        _run(group, rank, moves)
    return found


def _by_group(spreads: Iterable[Spread | None]) -> dict[ProcessGroup | None, list[Spread]]:
    found: dict[ProcessGroup | None, list[Spread]] = {}
    for of in spreads:
        if of is not None:
            found.setdefault(of.group, []).append(of)
    return found


@dataclass(frozen=True)
class _Move:
    """A part of an array from one rank of a group to another. ``reads_whole``: the array is whole where it comes from, and
    the part alone where it goes to; otherwise the other way about."""

    source: int
    to: int
    before: torch.Tensor | None
    after: torch.Tensor | None
    start: int
    numel: int
    reads_whole: bool

    @property
    def sent(self) -> torch.Tensor:
        assert self.before is not None  # asked for on the rank that it comes from
        return self.before[self.start :][: self.numel] if self.reads_whole else self.before

    def put(self, values: torch.Tensor) -> None:
        assert self.after is not None  # called on the rank that it goes to
        (self.after if self.reads_whole else self.after[self.start :][: self.numel]).copy_(values)


def _run(group: ProcessGroup | None, rank: int, moves: Sequence[_Move]) -> None:
    """Makes the moves that begin or end on this rank, those between two ranks in one message."""
    outgoing: dict[int, list[_Move]] = defaultdict(list)
    incoming: dict[int, list[_Move]] = defaultdict(list)
    for move in moves:
        if move.source == move.to == rank:
            move.put(move.sent)
        elif move.source == rank:
            outgoing[move.to].append(move)
        elif move.to == rank:
            incoming[move.source].append(move)
    operations, received = [], {}
    for peer, of_peer in sorted(outgoing.items()):
        operations.append(dist.P2POp(dist.isend, torch.cat([move.sent for move in of_peer]), _peer(group, peer), group))
    for peer, of_peer in sorted(incoming.items()):
        assert of_peer[0].after is not None
        received[peer] = of_peer[0].after.new_empty(sum(move.numel for move in of_peer))
        operations.append(dist.P2POp(dist.irecv, received[peer], _peer(group, peer), group))
    for handle in dist.batch_isend_irecv(operations) if operations else ():
        handle.wait()
    for peer, of_peer in incoming.items():
        for move, values in zip(of_peer, received[peer].split([move.numel for move in of_peer])):
            move.put(values)


def _peer(group: ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
