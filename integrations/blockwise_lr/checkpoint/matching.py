"""Matching of saved states to an optimizer's tensors by their contents and not by their indices.

The *contents* of a tensor are its fragments of parameters, in order; a whole parameter is one fragment. So states that
were saved with other indices, in another parameter order or under names are matched to the right tensors, and states of
flat shards with other contents are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..blocks.block_map import plain_name
from .errors import CheckpointError

Part = tuple[str, int, int, int]  # of a fragment: parameter, first element, number of elements, offset in the tensor
Contents = tuple[Part, ...]


def merged(fragments: Sequence[Part]) -> Contents:
    """Contents with adjacent fragments of one parameter joined, so that equal contents compare equal."""
    found: list[Part] = []
    for name, start, numel, offset in fragments:
        if found:
            last, low, size, at = found[-1]
            if last == name and low + size == start and at + size == offset:
                found[-1] = (name, low, size + numel, at)
                continue
        found.append((name, start, numel, offset))
    return tuple(found)


def positions(
    groups: Sequence[Mapping[str, Any]],
    own: Sequence[Sequence[Contents]],
    recorded: Sequence[Sequence[Contents]] | None,
) -> dict[Any, int]:
    """Saved index (or name) of a tensor -> its position among the optimizer's tensors.

    Args:
        groups: the saved param groups.
        own: per param group, the contents of each of the optimizer's tensors.
        recorded: per saved param group, the contents of each saved tensor; None if they were not recorded.

    Raises:
        CheckpointError: another number of groups or tensors, or tensors with other contents.
    """
    sizes, saved_sizes = [len(group) for group in own], [len(group["params"]) for group in groups]
    if sizes != saved_sizes:
        raise CheckpointError(
            f"the saved optimizer state has param groups of {saved_sizes} tensors and this optimizer "
            f"of {sizes}; start with the model, ZeRO stage and param groups it was saved from, or go "
            f"through a universal checkpoint"
        )
    ids = list(chain.from_iterable(group["params"] for group in groups))
    if len(set(map(_hashable, ids))) != len(ids):
        raise CheckpointError("the saved optimizer state names a parameter twice in its param groups; save it again")
    found, base = {}, 0
    for number, (group, contents) in enumerate(zip(groups, own)):
        saved = _saved_contents(group, contents, recorded[number] if recorded and number < len(recorded) else None)
        order = range(len(contents)) if saved is None else _order(saved, contents, number)
        found.update({index: base + position for index, position in zip(group["params"], order)})
        base += len(contents)
    return found


def _hashable(index: Any) -> Any:
    try:
        hash(index)
    except TypeError:
        raise CheckpointError(
            f"the saved optimizer state numbers a parameter {index!r}; numbers and names are needed"
        ) from None
    return index


def _saved_contents(
    group: Mapping[str, Any], own: Sequence[Contents], recorded: Sequence[Contents] | None
) -> Sequence[Contents] | None:
    """The contents of the saved tensors by their names, or else by the record; None if they are not known."""
    numbers = group["params"]
    if numbers and all(isinstance(name, str) for name in numbers):  # torch's state dicts by names, in any order
        return _by_names(numbers, own)
    if recorded is not None and len(recorded) == len(numbers):
        return recorded
    return _by_names(group.get("param_names") or (), own)


def _by_names(names: Sequence[str], own: Sequence[Contents]) -> Sequence[Contents] | None:
    """The contents of whole parameters with these names; None if none of the names is in this run.

    Raises:
        CheckpointError: only some of the names are in this run.
    """
    whole = {contents[0][0]: contents for contents in own if len(contents) == 1}
    known = [plain_name(name) for name in names if plain_name(name) in whole]
    if not known:
        return None
    if set(known) != whole.keys() or len(known) != len(names):
        other = next((name for name in names if plain_name(name) not in whole), None) or next(
            name for name in whole if name not in known
        )
        raise CheckpointError(
            f"the saved optimizer state and this run's model differ in the parameter {other}; start with "
            f"the model it was saved from"
        )
    return [whole[name] for name in known]


def _order(saved: Sequence[Contents], own: Sequence[Contents], number: int) -> list[int]:
    """The position of each saved tensor's contents in this run."""
    at = {contents: position for position, contents in enumerate(own)}
    if len(at) < len(own) or set(saved) != set(own):
        if list(saved) == list(own):  # several empty tensors
            return list(range(len(own)))
        raise CheckpointError(_difference(saved, own, number))
    return [at[contents] for contents in saved]


def _difference(saved: Sequence[Contents], own: Sequence[Contents], number: int) -> str:
    before, now = next(pair for pair in zip(saved, own) if pair[0] != pair[1])
    ends = (before[-1] if before else None, now[-1] if now else None)
    old, new = next(((a, b) for a, b in zip(before, now) if a != b), ends)
    return (
        f"the saved optimizer state of param group {number} lies in another order than this run's: {_shown(old)} "
        f"there, {_shown(new)} here; define the parameters in the order and use the options (round_robin_gradients) "
        f"it was saved with, or convert the checkpoint to a universal one, which goes by names, and load that"
    )


def _shown(part: Part | None) -> str:
    if part is None:
        return "nothing"
    name, start, numel, offset = part
    return f"elements {start} to {start + numel} of {name} at {offset}"
