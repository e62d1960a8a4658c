"""Which saved state belongs to which of an optimizer's tensors: by what lies in them, and not by their numbers.

Every tensor is known by its *contents*: the fragments of parameters that lie in it, in order. A whole parameter is one
fragment. States saved under other numbers, in another order of the parameters or under names are so brought to their own
tensor, and states of flat shards that hold something else are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..blocks.block_map import plain_name
from .errors import CheckpointError

# (parameter, first element, elements, where in the tensor), for each fragment
Contents = tuple[tuple[str, int, int, int], ...]


def merged(fragments: Sequence[tuple[str, int, int, int]]) -> Contents:
    """Contents with neighbouring fragments of one parameter joined; how finely they are cut says nothing."""
    found: list[tuple[str, int, int, int]] = []
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
    """The position among the optimizer's tensors of each saved number (or name).

    Args:
        groups: the saved param groups.
        own: per param group, what lies in each of the optimizer's tensors.
        recorded: per saved param group, the same of the saved ones; None where that was not recorded.

    Raises:
        CheckpointError: other numbers of groups or tensors, or tensors with other contents.
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
    """What lies in the saved tensors, as far as names, or else the record, tell; None where nothing tells."""
    numbers = group["params"]
    if numbers and all(isinstance(name, str) for name in numbers):  # torch's state dicts by names, in any order
        return _by_names(numbers, own)
    if recorded is not None and len(recorded) == len(numbers):
        return recorded
    return _by_names(group.get("param_names") or (), own)


def _by_names(names: Sequence[str], own: Sequence[Contents]) -> Sequence[Contents] | None:
    """The contents of whole parameters of these names; None where the names are none of this run's.

    Raises:
        CheckpointError: some are and some are not.
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
    """Where each saved tensor's contents lie now."""
    at = {contents: position for position, contents in enumerate(own)}
    if len(at) < len(own) or set(saved) != set(own):
        if list(saved) == list(own):  # several that hold nothing
            return list(range(len(own)))
        raise CheckpointError(_difference(saved, own, number))
    return [at[contents] for contents in saved]


def _difference(saved: Sequence[Contents], own: Sequence[Contents], number: int) -> str:
    before, now = next(pair for pair in zip(saved, own) if pair[0] != pair[1])
    old, new = next(((a, b) for a, b in zip(before, now) if a != b), (before[-1:] or None, now[-1:] or None))
    return (
        f"the saved optimizer state of param group {number} lies in another order than this run's: {_shown(old)} there, "
        f"{_shown(new)} here; define the parameters in the order and use the options (round_robin_gradients) it was saved "
        f"with, or convert the checkpoint to a universal one, which goes by names, and load that"
    )


def _shown(fragment: Any) -> str:
    if not fragment:
        return "nothing"
    name, start, numel, offset = fragment[0] if isinstance(fragment[0], tuple) else fragment
    return f"elements {start} to {start + numel} of {name} at {offset}"
