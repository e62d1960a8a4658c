"""The layout of one parameter: the block types of its rows, and the segments that share one Adam-mini second moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .types import BlockError, BlockType

MATRIX, BIAS, NORM = "matrix", "bias", "norm"


class Rate(NamedTuple):
    """What a learning rate follows from: the ratio of a block type, or of a block of the user's own, times a factor.

    Attributes:
        block: the block type's value, or the own block's name: a key of ``block_lr_ratios``.
        scale: the factor that rules put on it (``lr_scale``, ``layer_decay``).
    """

    block: str
    scale: float = 1.0


@dataclass(frozen=True)
class Piece:
    """Consecutive output units of one block type: rows, or columns of a transposed weight.

    Attributes:
        block: the block type.
        size: output units per repeat of the pattern.
        unit: output units per Adam-mini second moment (a head: head_dim; a neuron: 1). 0: one for the whole piece, over
            all repeats. None: unknown, because the number of heads is.
        role: the part within the block type ("q", "k", "gate", ...); only shown to users.
    """

    block: BlockType
    size: int
    unit: int | None = 1
    role: str = ""


@dataclass(frozen=True)
class ParamLayout:
    """The pieces of one parameter on this rank (under tensor parallelism, of this rank's slice).

    The pieces are contiguous along the output axis, and the pattern repeats: Megatron's fused QKV is
    [q heads of a group, k, v] once per query group, GPT-2's is [q, k, v] once, a plain weight is one piece.

    Attributes:
        name: the parameter's dotted name.
        shape: its shape in the model's forward pass; unpartitioned, also under ZeRO-3.
        pieces: the pattern along the output axis.
        repeat: how often the pattern repeats.
        transposed: the output axis is the last one (Conv1D; y = x W) and not the first.
        batch_dims: leading dimensions that count independent matrices (stacked experts).
        kind: ``matrix``, ``bias`` or ``norm``; the last two have no weight decay by default.
        own: the block of the user's own whose ratio it trains at, in place of its block types'; "": at theirs.
        lr_scale: a factor on these ratios.

    Raises:
        BlockError: the pieces do not cover the output units, or do not divide into their units.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    repeat: int = 1
    transposed: bool = False
    batch_dims: int = 0
    kind: str = MATRIX
    own: str = ""
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.period * self.repeat != self.outputs:
            raise BlockError(
                f"{self.name}: the pattern {[(p.role or p.block.value, p.size) for p in self.pieces]} x {self.repeat} "
                f"covers {self.period * self.repeat} of the {self.outputs} rows of shape {self.shape}; "
                f"correct the head counts or the rule"
            )
        for piece in self.pieces:
            if piece.unit and piece.size % piece.unit:
                raise BlockError(
                    f"{self.name}: {piece.size} rows of {piece.role or piece.block.value} do not divide "
                    f"into heads of {piece.unit}; correct the head counts or the rule"
                )

    @property
    def period(self) -> int:
        """Output units in one repeat of the pattern."""
        return sum(piece.size for piece in self.pieces)

    @property
    def batch(self) -> int:
        """Number of independent matrices stacked in the leading dimensions."""
        return math.prod(self.shape[: self.batch_dims])

    @property
    def outputs(self) -> int:
        """Output units of one matrix."""
        matrix = self.shape[self.batch_dims :]
        return (matrix[-1] if self.transposed else matrix[0]) if matrix else 1

    @property
    def inputs(self) -> int:
        """Elements per output unit."""
        return self.numel // (self.batch * self.outputs) if self.numel else 0

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def is_consecutive(self) -> bool:
        """Whether its segments are contiguous in memory, as an embedding's rows are."""
        return len(self.pieces) == 1 and not self.transposed

    @property
    def blocks(self) -> tuple[BlockType, ...]:
        """The block types in it, in order of appearance."""
        return tuple(dict.fromkeys(piece.block for piece in self.pieces))

    def spans(self) -> list[tuple[int, int, Piece]]:
        """(start, end, piece) along the output axis, one entry per piece and repeat."""
        spans, start = [], 0
        for _ in range(self.repeat):
            for piece in self.pieces:
                spans.append((start, start + piece.size, piece))
                start += piece.size
        return spans

    @property
    def has_own_rate(self) -> bool:
        """Whether a rule of the user's gives it another rate than its block types'."""
        return bool(self.own) or self.lr_scale != 1

    def rate(self, block: BlockType) -> Rate:
        """What the learning rate of its elements of a block type follows from."""
        return Rate(self.own or block.value, self.lr_scale)

    def block_numel(self) -> dict[BlockType, int]:
        """Elements per block type."""
        counts: dict[BlockType, int] = {}
        for piece in self.pieces:
            counts[piece.block] = counts.get(piece.block, 0) + piece.size * self.repeat * self.batch * self.inputs
        return counts

    def describe(self) -> str:
        """A short description, e.g. ``rows: (128 q + 64 k + 64 v) x 8``."""
        axis = "columns" if self.transposed else "rows"
        if len(self.pieces) == 1:
            return "all"
        parts = " + ".join(f"{p.size} {p.role or p.block.value}" for p in self.pieces)
        return f"{axis}: {parts}" if self.repeat == 1 else f"{axis}: ({parts}) x {self.repeat}"
