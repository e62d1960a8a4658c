"""The block types of a Transformer and the paper's ratios between their learning rates."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Mapping
from enum import Enum
from typing import Any


class BlockType(str, Enum):
    """What a row of a parameter belongs to. Biases belong to the block of their weight.

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
# Block types the paper does not measure follow another one unless they are set: the head is trained like the embedding
# (its loss is 0.08 worse at ratio 1 in our probe), routers and state-space mixers like the other linear layers.
FOLLOWS: Mapping[BlockType, BlockType] = {
    BlockType.HEAD: BlockType.EMBEDDING,
    BlockType.ROUTER: BlockType.FFN,
    BlockType.SSM: BlockType.FFN,
}


class BlockError(ValueError):
    """A block type, ratio, rule or parameter name that cannot be used; the message says how to mend it."""


def block_type(name: str | BlockType) -> BlockType:
    """The block type of that name.

    Raises:
        BlockError: there is none; the message lists those there are.
    """
    try:
        return BlockType(name)
    except ValueError:
        known = ", ".join(b.value for b in BlockType)
        raise BlockError(f"unknown block type {name!r}; use one of {known}") from None


def block_values(values: Mapping[str, float] | None, what: str, *, positive: bool) -> dict[BlockType, float]:
    """Checks a mapping of block type names to numbers, as in ``block_lr_ratios``.

    Args:
        values: names to finite numbers; None counts as empty.
        what: the option's name, for the error.
        positive: whether 0 is refused too.

    Raises:
        BlockError: an unknown name, or a value that is negative, not finite or not a number.
    """
    checked = {}
    if values is not None and not isinstance(values, Mapping):
        raise BlockError(f"{what} must map block types to numbers, got {shown(values)}")
    for name, value in (values or {}).items():
        try:
            block = block_type(name)
        except BlockError as error:
            raise BlockError(f"{what}: {error}") from None
        number = finite(value)
        if number is None or number < 0 or (positive and number == 0):
            bound = "a finite number above 0" if positive else "a finite number, 0 or above"
            raise BlockError(f"{what}[{name!r}] is {shown(value)}; give {bound}")
        checked[block] = number
    return checked


def shown(value: Any) -> str:
    """A value for an error message, of bounded length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxdict = 8
    try:
        return short.repr(value)
    except ValueError:  # Python shows no integer of more than 4,300 digits
        return f"a {type(value).__name__} too long to be shown"


def finite(value: Any) -> float | None:
    """A finite number as a float; None for anything else, text and truth values among it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def lr_ratios(values: Mapping[str, float] | None = None) -> dict[BlockType, float]:
    """The ratio of every block type: the given ones, then the paper's, then that of the type it follows.

    Raises:
        BlockError: as :func:`block_values`; a ratio of 0 would freeze a block and is refused (set requires_grad=False).
    """
    ratios = {**PAPER_RATIOS, **block_values(values, "block_lr_ratios", positive=True)}
    return {block: ratios[block] if block in ratios else ratios[FOLLOWS[block]] for block in BlockType}
