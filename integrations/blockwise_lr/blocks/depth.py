"""Which layer of how many a parameter is in, by the numbers in names; what rules of ``layers`` and ``layer_decay`` go by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .types import BlockError, BlockType

# a layer's number: a part of a name of its own, or the end of one (torchvision's encoder_layer_0)
_NUMBER = re.compile(r"(.*(?:layer|block)_)?(\d+)\Z")
_MIXERS = frozenset({BlockType.QK, BlockType.VO, BlockType.SSM})
# outside of the layers and before the first one, besides embeddings: their norms
_BEFORE = re.compile(r"embed|norm_pre|ln_pre|pre_?(?:layer|layr)_?norm")
Stack = tuple[str, ...]  # the parts of a name before the number


@dataclass(frozen=True)
class Place:
    """Where a parameter is.

    Attributes:
        index: its layer among those of its stack, from 0; -1: before the first; ``count``: behind the last.
        count: layers of the stack.
    """

    index: int
    count: int

    @property
    def is_inside(self) -> bool:
        """Whether it is in a layer."""
        return 0 <= self.index < self.count

    @property
    def from_top(self) -> int:
        """How many layers it is below what is behind the last one, which has 0; as in layer-wise decay."""
        return self.count - self.index


class Depths:
    """The stacks of layers of a model, and the place of each of its parameters.

    A stack is what differs in one number of the name only. Of several numbers in a name the outermost counts whose stack
    has two layers or more and holds an attention or another mixer of tokens, so that no expert or module of a
    classifier is a layer.

    Args:
        blocks: parameter name -> its block types, for those that are known.
        names: of all parameters, those of other pipeline stages and frozen ones included.
    """

    def __init__(self, blocks: Mapping[str, Iterable[BlockType]], names: Iterable[str]) -> None:
        found: dict[Stack, set[int]] = {}
        mixing: set[Stack] = set()
        for name in dict.fromkeys([*blocks, *names]):
            for stack, number in _numbers(name):
                found.setdefault(stack, set()).add(number)
                if not _MIXERS.isdisjoint(blocks.get(name, ())):
                    mixing.add(stack)
        several = {stack: sorted(numbers) for stack, numbers in found.items() if len(numbers) > 1}
        kept = mixing & several.keys() or mixing or several.keys()
        self._stacks = {stack: sorted(found[stack]) for stack in kept}

    def place(self, name: str, blocks: Iterable[BlockType] = ()) -> Place | None:
        """The place of a parameter; None in a model without layers.

        What is in no layer belongs to the stacks with which its name has most in common (to the longest of these):
        before the first layer if it is an embedding or a norm of embeddings, and behind the last otherwise.
        """
        for stack, number in _numbers(name):
            if stack in self._stacks:
                numbers = self._stacks[stack]
                return Place(numbers.index(number), len(numbers)) if number in numbers else None
        if not self._stacks:
            return None
        parts = tuple(name.split("."))
        shared = {stack: _in_common(stack, parts) for stack in self._stacks}
        most = max(shared.values())
        count = max(len(self._stacks[stack]) for stack, common in shared.items() if common == most)
        return Place(-1 if BlockType.EMBEDDING in blocks or _BEFORE.search(name) else count, count)

    def __str__(self) -> str:
        return ", ".join(f"{'.'.join(stack)} has {len(numbers)}" for stack, numbers in self._stacks.items()) or "none"


def _numbers(name: str) -> list[tuple[Stack, int]]:
    """The numbers in a name with what is before each, outermost first."""
    parts = name.split(".")
    found = []
    for position, part in enumerate(parts):
        match = _NUMBER.match(part)
        if match:
            found.append(((*parts[:position], *filter(None, [match.group(1)])), int(match.group(2))))
    return found


def _in_common(stack: Stack, parts: tuple[str, ...]) -> int:
    return next((at for at, (one, other) in enumerate(zip(stack, parts)) if one != other), min(len(stack), len(parts)))


_RANGE = re.compile(r"(\d+)(?:-(\d+))?\Z")
_SOME = re.compile(r"(first|last)(?: (\d+))?\Z")
WANTED = 'give "first", "last", "first 4", "last 4", "lower half", "upper half", or numbers from 0 as in "0-3,8"'


@dataclass(frozen=True)
class Layers:
    """Layers of a stack, as a rule's ``layers`` names them: ``"first"``, ``"last 4"``, ``"upper half"``, ``"0-3,8"``."""

    text: str

    def __post_init__(self) -> None:
        for part in self._parts:
            numbers = _RANGE.match(part)
            some = _SOME.match(part)
            empty = numbers and numbers.group(2) and int(numbers.group(2)) < int(numbers.group(1))
            none = some and some.group(2) and int(some.group(2)) == 0
            if empty or none or not (numbers or some or part in ("lower half", "upper half")):
                raise BlockError(f"{part!r} names no layers; {WANTED}")

    @property
    def _parts(self) -> list[str]:
        return [part.strip() for part in self.text.split(",")]

    def hold(self, place: Place | None) -> bool:
        """Whether a place is in one of these layers. Of an odd number of layers the middle one is in the upper half."""
        return (
            place is not None
            and place.is_inside
            and any(_holds(part, place.index, place.count) for part in self._parts)
        )


def _holds(part: str, index: int, count: int) -> bool:
    if part in ("lower half", "upper half"):
        return (index < count // 2) == (part == "lower half")
    some = _SOME.match(part)
    if some:
        wanted = int(some.group(2) or 1)
        return index < wanted if some.group(1) == "first" else index >= count - wanted
    numbers = _RANGE.match(part)
    assert numbers is not None  # a Layers is checked when it is made
    return int(numbers.group(1)) <= index <= int(numbers.group(2) or numbers.group(1))
