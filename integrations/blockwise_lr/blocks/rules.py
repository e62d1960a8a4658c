"""Naming rules: globs over parameter names, with their block type or the layout of a fused weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .depth import Layers
from .dims import HeadCounts
from .globs import matches
from .layout import BIAS, MATRIX, NORM, ParamLayout, Piece
from .types import BlockError, BlockType

# role -> (block type, HeadCounts field with its number of heads)
ROLES: dict[str, tuple[BlockType, str | None]] = {
    "q": (BlockType.QK, "q"),
    "k": (BlockType.QK, "kv"),
    "v": (BlockType.VO, None),
    "gate": (BlockType.VO, None),  # an attention output gate scales the value path
    "up": (BlockType.FFN, None),
}
Interleave = Literal["none", "head", "group"]
# (shape, heads) -> (pieces, repeat), for layouts that no other field of a rule describes
LayoutFn = Callable[[tuple[int, ...], HeadCounts], tuple[tuple[Piece, ...], int]]


@dataclass(frozen=True)
class OwnRate:
    """The rate that a user's rule gives its parameters.

    Attributes:
        own: the block of the user's own that they are; "": they stay at their block types' rates.
        ratio: that block's peak learning rate over ``lr``; None: block_lr_ratios states it.
        scale: a factor on the rate.
        layer_decay: a further factor for every layer that they are below what is behind the last one, see
            :attr:`~blockwise_lr.blocks.depth.Place.from_top`.
    """

    own: str = ""
    ratio: float | None = None
    scale: float = 1.0
    layer_decay: float | None = None


@dataclass(frozen=True)
class Rule:
    """One line of a family's table, or a rule of the user's own.

    Attributes:
        match: glob over the whole dotted name; see :mod:`~blockwise_lr.blocks.globs`.
        tail: match only so many parts of the name, counted from its end without the numbers of layers; 0: all of it.
        within: glob over the classes of the modules around the parameter, outermost first and each followed by a slash
            ("BertModel/BertEncoder/.../Linear/"); empty: any, also where only names are known.
        block: the block type of the whole parameter; None for a fused weight.
        heads: "q" or "kv" if Adam-mini's segments are heads of that kind; None: one segment per output unit.
        split: roles of a fused weight in order, e.g. ("q", "k", "v").
        interleave: their order in a fused weight: "none" all q, all k, all v; "head" [q, k, v] per head; "group" [the
            group's q heads, k, v] per query group.
        transposed: the output axis is the last one (Conv1D).
        batch_dims: leading dimensions of stacked experts; None: all but the last two (tokens and position tables).
        vector: match parameters of at most one dimension only (norm rules must not match matrices).
        special: a function that returns the pieces, for layouts that the fields above do not describe.
        undecayed: no weight decay by default, for any shape (a state-space model's time scales).
        view: a function that returns the shape in the model's forward pass, if it differs from the stored one.
        role: what to call a whole parameter, where "q" and "k" do not fit.
        shares: of ``split``: how many parts of equal size each role has in one repeat; (): as many as heads.
        repeats: how often the pattern of ``split`` repeats, in place of ``interleave``; 0: as that says.
        head_counts: of q and kv, in place of the model's; None: the model's.
        layers: only parameters in these layers; None: any.
        rate: what rate the parameters train at; a rule of a rate alone has neither block, split nor special.
    """

    match: str
    block: BlockType | None = None
    heads: str | None = None
    split: tuple[str, ...] = ()
    interleave: Interleave = "none"
    transposed: bool = False
    batch_dims: int | None = 0
    vector: bool = False
    special: LayoutFn | None = None
    undecayed: bool = False
    view: Callable[[tuple[int, ...], HeadCounts], tuple[int, ...]] | None = None
    role: str = ""
    tail: int = 0
    within: str = ""
    shares: tuple[int, ...] = ()
    repeats: int = 0
    head_counts: tuple[int | None, int | None] = (None, None)
    layers: Layers | None = None
    rate: OwnRate | None = None

    @property
    def is_layout(self) -> bool:
        """Whether it says what its parameters are, and not their rate alone."""
        return self.rate is None or self.block is not None or bool(self.split) or self.special is not None

    def matches(self, name: str, shape: tuple[int, ...], classes: str = "") -> bool:
        """Whether the rule applies to a parameter of that name and shape inside modules of those classes."""
        if self.vector and len(shape) > 1:
            return False
        if self.tail:
            name = ".".join([part for part in name.split(".") if not part.isdigit()][-self.tail :])
        return matches(self.match, name) and (not self.within or matches(self.within, classes))

    def layout(self, name: str, shape: tuple[int, ...], heads: HeadCounts | None) -> ParamLayout:
        """The layout of a parameter of that name and shape.

        Raises:
            BlockError: the layout needs unknown head counts, or the shape contradicts the rule or the head counts.
        """
        try:
            return self._layout(name, shape, heads)
        except BlockError as error:
            raise BlockError(
                f"block rule {self.match!r} does not fit {name} of shape {tuple(shape)}: {error}"
            ) from None

    def _layout(self, name: str, shape: tuple[int, ...], heads: HeadCounts | None) -> ParamLayout:
        heads = self._own_heads(heads)
        if self.view is not None:
            shape = self.view(shape, required_heads(heads))
        batch_dims = max(0, len(shape) - 2) if self.batch_dims is None else self.batch_dims
        if batch_dims and batch_dims >= len(shape):
            raise BlockError(
                f"batch_dims is {batch_dims}, which leaves none of its {len(shape)} dimensions to a "
                f"matrix or vector; give a smaller batch_dims"
            )
        # A bias has no input axis: it is one vector per stacked matrix, and its output axis is always the last.
        vector = self.undecayed or len(shape) <= 1 + batch_dims
        kind = NORM if self.block is BlockType.NORM else BIAS if vector else MATRIX
        base = ParamLayout(
            name,
            shape,
            (Piece(BlockType.FFN, _outputs(shape, self.transposed and kind == MATRIX, batch_dims)),),
            transposed=self.transposed and kind == MATRIX,
            batch_dims=batch_dims,
            kind=kind,
        )
        if self.special is not None:
            pieces, repeat = self.special(shape, required_heads(heads))
        elif self.split:
            pieces, repeat = self._fused(base, heads)
        elif self.block is None:
            raise BlockError("the rule has no block, split or special; give it one of them")
        else:
            pieces, repeat = (Piece(self.block, base.outputs, self._unit(base, heads), self._role()),), 1
        if kind != MATRIX:  # one second moment per vector (the optimizer offers one per element for biases)
            pieces = tuple(Piece(p.block, p.size, 0, p.role) for p in pieces)
        return ParamLayout(name, shape, pieces, repeat, base.transposed, base.batch_dims, kind)

    def _role(self) -> str:
        return self.role or {"q": "q", "kv": "k"}.get(self.heads or "", "")

    def _unit(self, base: ParamLayout, heads: HeadCounts | None) -> int | None:
        if self.heads is None:
            return 1
        if heads is None:
            return None
        if heads.head_dim and base.outputs % heads.head_dim == 0:  # the attention module's own, which layers differ in
            return heads.head_dim
        return _divide(base, getattr(heads, self.heads))

    def _own_heads(self, heads: HeadCounts | None) -> HeadCounts | None:
        """The model's head counts, with the rule's own in their place; of one tensor-parallel rank."""
        if self.head_counts == (None, None):
            return heads
        parts = _parts(heads)
        q, kv = (None if count is None else _whole(count, parts, "heads") for count in self.head_counts)
        q = q or (heads.q if heads is not None else kv)
        kv = kv or (heads.kv if heads is not None else q)
        assert q is not None and kv is not None  # one of both is given
        return HeadCounts(q, kv, {}) if heads is None else replace(heads, q=q, kv=kv, head_dim=None)

    def _fused(self, base: ParamLayout, heads: HeadCounts | None) -> tuple[tuple[Piece, ...], int]:
        if self.shares:
            return self._shared_out(base, heads)
        if heads is None and self.interleave == "none" and not self.repeats and set(self.split) == {"q", "k", "v"}:
            # without head counts, assume equal thirds; the head size that Adam-mini needs is unknown
            third = _divide(base, len(self.split))
            return tuple(Piece(ROLES[r][0], third, None if ROLES[r][1] else 1, r) for r in self.split), 1
        counts = required_heads(heads)
        repeats = self.repeats and _whole(self.repeats, _parts(heads), "repeats")
        return qkv_pieces(base.outputs, counts.q, counts.kv, self.interleave, self.split, repeats)

    def _shared_out(self, base: ParamLayout, heads: HeadCounts | None) -> tuple[tuple[Piece, ...], int]:
        """The pieces of a pattern whose roles have stated shares of the output units."""
        repeats = _whole(self.repeats, _parts(heads), "repeats") if self.repeats else 1
        parts = sum(self.shares) * repeats
        if base.outputs % parts:
            raise BlockError(f"{base.outputs} rows do not divide into {parts} equal parts; correct split or interleave")
        pieces = []
        for role, share in zip(self.split, self.shares):
            block, kind = ROLES.get(role) or (BlockType(role), None)
            size = share * base.outputs // parts
            count = None if kind is None else 0 if heads is None else getattr(heads, kind)
            # a head's rows; not known without head counts, which Adam-mini then asks for
            unit = 1 if count is None else None if not count or size * repeats % count else size * repeats // count
            pieces.append(Piece(block, size, unit, role))
        return tuple(pieces), repeats


def _parts(heads: HeadCounts | None) -> int:
    """Tensor-parallel ranks that hold slices of the parameters that these head counts are for."""
    return (heads.config.get("tensor_model_parallel_size") if heads is not None else None) or 1


def _whole(count: int, parts: int, what: str) -> int:
    if count % parts:
        raise BlockError(
            f"its {count} {what} do not divide over {parts} tensor-parallel ranks; use a size that divides them"
        )
    return count // parts


def qkv_pieces(
    outputs: int,
    q: int,
    kv: int,
    interleave: Interleave = "none",
    split: tuple[str, ...] = ("q", "k", "v"),
    repeats: int = 0,
) -> tuple[tuple[Piece, ...], int]:
    """The pieces of a fused attention weight, and how often the pattern repeats.

    Args:
        outputs: output units of the weight.
        q, kv: query heads, and key and value heads.
        interleave, split: as in :class:`Rule`.
        repeats: in place of ``interleave``; 0: as that says.

    Raises:
        BlockError: the counts contradict each other or the number of output units.
    """
    _refuse_part_of_a_group(kv)
    per = {"q": q, "gate": q, "k": kv, "v": kv}
    parts = sum(per[role] for role in split)
    if outputs % parts:
        raise BlockError(
            f"{outputs} rows do not divide into {parts} heads; correct the head counts of the model's "
            f"config or the rule"
        )
    head, groups = outputs // parts, repeats or {"none": 1, "head": q, "group": kv}[interleave]
    if any(per[role] % groups for role in split):
        how = f"in {repeats} repeats" if repeats else f"per {interleave}"
        raise BlockError(
            f"{q} query and {kv} key heads cannot be interleaved {how}; correct the head counts or the rule"
        )
    return tuple(Piece(ROLES[r][0], per[r] // groups * head, head if ROLES[r][1] else 1, r) for r in split), groups


def _outputs(shape: tuple[int, ...], transposed: bool, batch_dims: int) -> int:
    matrix = shape[batch_dims:]
    return (matrix[-1] if transposed else matrix[0]) if matrix else 1


def _refuse_part_of_a_group(heads: int) -> None:
    if not heads:
        raise BlockError(
            "more tensor-parallel ranks than query groups share a group, which is known only of "
            "megatron-core's linear_qkv; use a tensor-parallel size up to the number of query groups"
        )


def _divide(base: ParamLayout, parts: int) -> int:
    _refuse_part_of_a_group(parts)
    if base.outputs % parts:
        raise BlockError(
            f"{base.outputs} rows do not divide into {parts} heads; correct the head counts of the model's "
            f"config or the rule"
        )
    return base.outputs // parts


def required_heads(heads: HeadCounts | None) -> HeadCounts:
    """The head counts.

    Raises:
        BlockError: they are not known.
    """
    if heads is None:
        raise BlockError(
            "it needs the numbers of heads, and the model has no `config` that states them; "
            "pass map_blocks(model, config={'num_attention_heads': …})"
        )
    return heads
