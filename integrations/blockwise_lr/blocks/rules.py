"""Naming rules: globs over parameter names, with their block type or the layout of a fused weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .dims import HeadCounts
from .globs import checked_glob, matches
from .layout import BIAS, MATRIX, NORM, ParamLayout, Piece
from .types import BlockError, BlockType, block_type, shown

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
class Rule:
    """One line of a family's table.

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

    def _fused(self, base: ParamLayout, heads: HeadCounts | None) -> tuple[tuple[Piece, ...], int]:
        if heads is None and self.interleave == "none" and set(self.split) == {"q", "k", "v"}:
            # without head counts, assume equal thirds; the head size that Adam-mini needs is unknown
            third = _divide(base, len(self.split))
            return tuple(Piece(ROLES[r][0], third, None if ROLES[r][1] else 1, r) for r in self.split), 1
        counts = required_heads(heads)
        return qkv_pieces(base.outputs, counts.q, counts.kv, self.interleave, self.split)


def qkv_pieces(
    outputs: int, q: int, kv: int, interleave: Interleave = "none", split: tuple[str, ...] = ("q", "k", "v")
) -> tuple[tuple[Piece, ...], int]:
    """The pieces of a fused attention weight, and how often the pattern repeats.

    Args:
        outputs: output units of the weight.
        q, kv: query heads, and key and value heads.
        interleave, split: as in :class:`Rule`.

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
    head, groups = outputs // parts, {"none": 1, "head": q, "group": kv}[interleave]
    if any(per[role] % groups for role in split):
        raise BlockError(
            f"{q} query and {kv} key heads cannot be interleaved per {interleave}; correct the head counts or the rule"
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


_BLOCKS = ", ".join(block.value for block in BlockType)
_MOST_DIMS = 64  # no tensor has more
# how to write the value of each key of a user rule, for error messages
_WANTED = {
    "match": 'give a glob over parameter names, as in "*.adapter.*"',
    "block": f"use one of {_BLOCKS}",
    "heads": 'use "q" or "kv"',
    "split": 'give a list of roles in their order, as in ["q", "k", "v"]',
    "interleave": 'use "none", "head" or "group"',
    "transposed": "write true or false, without quotes",
    "batch_dims": f"give a whole number from 0 to {_MOST_DIMS}, without quotes",
}
_EXAMPLE = '{"match": "*.adapter.*", "block": "ffn"}'


class UserRule(BaseModel):
    """A rule in JSON: ``{"match": "*.adapter.*", "block": "ffn"}``, or with ``split`` for a fused weight.

    Validation is strict: values of other types are refused and not converted, so that ``"false"`` is not true.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    match: str
    block: str | None = None
    heads: Literal["q", "kv"] | None = None
    split: tuple[str, ...] = Field((), strict=False)
    interleave: Interleave = "none"
    transposed: bool = False
    batch_dims: int = Field(0, ge=0, le=_MOST_DIMS)

    @field_validator("match")
    @classmethod
    def _glob(cls, value: str) -> str:
        return checked_glob(value)

    @field_validator("block", mode="before")
    @classmethod
    def _known_block(cls, value: object) -> object:
        return block_type(value).value if isinstance(value, str) else value

    @field_validator("split")
    @classmethod
    def _known_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [role for role in value if role not in ("q", "k", "v", "gate")]
        if unknown:
            raise BlockError(f"unknown role {unknown[0]!r} in split; use q, k, v, gate")
        if len(set(value)) < len(value):
            raise BlockError(f"split names a role twice: {', '.join(value)}; name each part of the fused weight once")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> UserRule:
        if (self.block is None) == (not self.split):
            raise BlockError('give either "block" or "split"')
        if self.heads is not None and self.split:
            raise BlockError('"heads" goes with "block"; leave it out beside "split", whose roles say it')
        if self.interleave != "none" and not self.split:
            raise BlockError('"interleave" goes with "split"; leave it out beside "block"')
        return self

    def rule(self) -> Rule:
        """The rule that this JSON object describes."""
        block = None if self.block is None else block_type(self.block)
        return Rule(self.match, block, self.heads, self.split, self.interleave, self.transposed, self.batch_dims)


def user_rules(entries: Iterable[Rule | Mapping[str, Any]] | None) -> tuple[Rule, ...]:
    """Validates user rules.

    Args:
        entries: rules, or mappings in the form of :class:`UserRule`; None: none.

    Raises:
        BlockError: an entry with an unknown key or a value that its key does not accept; the message names both.
    """
    if entries is None:
        return ()
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise BlockError(f"block_rules must be a list of rules like {_EXAMPLE}, got {shown(entries)}")
    return tuple(_checked(entry) for entry in entries)


def _checked(entry: object) -> Rule:
    if isinstance(entry, Rule):
        return entry
    if not isinstance(entry, Mapping):
        raise BlockError(f"block rule {shown(entry)} is no object; write it like {_EXAMPLE}")
    try:
        return UserRule.model_validate(dict(entry)).rule()
    except ValidationError as error:
        raise BlockError(f"block rule {shown(dict(entry))}: {_problem(error.errors(include_url=False)[0])}") from None


def _problem(problem: Mapping[str, Any]) -> str:
    """A pydantic error of a user rule as a sentence: the key, its value, and the values it accepts."""
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; use {', '.join(_WANTED)}"
    if problem["type"] == "missing":
        return f"{key} is missing; {_WANTED[key]}"
    own = problem.get("ctx", {}).get("error")
    if own is None:
        return f"{key} is {shown(problem['input'])}; {_WANTED[key]}"
    return f"match {shown(problem['input'])} {own}" if key == "match" else f"{key}: {own}" if key else str(own)
