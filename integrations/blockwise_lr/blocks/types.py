"""The block types of a Transformer, and the ratios between their learning rates that the paper uses."""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any


class BlockType(str, Enum):
    """The block type of a row of a parameter; a bias has that of its weight.

    ``head`` is an output layer that shares no memory with the embedding; a tied one is ``embedding``.
    ``router`` and ``ssm`` (state-space mixers) are not in the paper.
    """

    EMBEDDING = "embedding"
    HEAD = "head"
    QK = "qk"
    VO = "vo"
    FFN = "ffn"
    NORM = "norm"
    ROUTER = "router"
    SSM = "ssm"

    def __str__(self) -> str:
        return self.value


# Peak learning rate of a block type over the base learning rate (Blockwise LR, arXiv 2502.19002).
PAPER_RATIOS: Mapping[BlockType, float] = {
    BlockType.EMBEDDING: 10.0,
    BlockType.QK: 8.0,
    BlockType.FFN: 6.0,
    BlockType.VO: 4.0,
    BlockType.NORM: 1.0,
}
# Default ratios of block types that the paper does not measure: the head's is the embedding's (with ratio 1 the loss
# was 0.08 higher in our runs), those of routers and state-space mixers are the other linear layers'.
DEFAULT_RATIO_OF: Mapping[BlockType, BlockType] = {
    BlockType.HEAD: BlockType.EMBEDDING,
    BlockType.ROUTER: BlockType.FFN,
    BlockType.SSM: BlockType.FFN,
}


class BlockError(ValueError):
    """A block type, ratio, rule or parameter name that cannot be used; the message says how to fix it."""


def block_type(name: str | BlockType, own: Iterable[str] = ()) -> BlockType:
    """The block type of that name.

    Raises:
        BlockError: there is none; the message lists the known ones, and the ``own`` names beside them.
    """
    try:
        return BlockType(name)
    except ValueError:
        known = ", ".join([*(b.value for b in BlockType), *own])
        raise BlockError(f"unknown block type {name!r}; use one of {known}") from None


def block_values(
    values: Mapping[str, Any] | None, what: str, *, positive: bool, own: Iterable[str] = ()
) -> dict[BlockType | str, float]:
    """Checks a mapping from block type names to numbers, as in ``block_lr_ratios``.

    Args:
        values: name of a block type, or of a block of the user's own -> finite number; None: empty.
        what: the option's name, for error messages.
        positive: refuse 0 as well as negative numbers.
        own: the names of the user's own blocks.

    Raises:
        BlockError: an unknown name, or a value that is negative, not finite or not a number.
    """
    checked: dict[BlockType | str, float] = {}
    own = tuple(own)
    if values is not None and not isinstance(values, Mapping):
        raise BlockError(f"{what} must map block types to numbers, got {shown(values)}")
    for name, value in (values or {}).items():
        try:
            block = name if name in own else block_type(name, own)
        except BlockError as error:
            raise BlockError(f"{what}: {error}") from None
        number = finite(value)
        if number is None or number < 0 or (positive and number == 0):
            bound = "a finite number above 0" if positive else "a finite number, 0 or above"
            raise BlockError(f"{what}[{name!r}] is {shown(value)}; give {bound}")
        checked[block] = number
    return checked


def shown(value: object) -> str:
    """A value's repr of bounded length, for error messages."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxdict = 8
    try:
        return short.repr(value)
    except ValueError:  # Python shows no integer of more than 4,300 digits
        return f"a {type(value).__name__} too long to be shown"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the known name that is nearest to another one; "" where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def finite(value: object) -> float | None:
    """A finite number as a float; None for anything else, including strings and booleans."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
