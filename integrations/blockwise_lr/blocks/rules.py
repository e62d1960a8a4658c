"""Naming rules: which parameter names are which block, and how fused weights are laid out. Rules are data."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from .dims import HeadCounts
from .layout import BIAS, MATRIX, NORM, ParamLayout, Piece
from .types import BlockError, BlockType, block_type

# role -> (block type, whose heads it has)
ROLES: dict[str, tuple[BlockType, str | None]] = {
    "q": (BlockType.QK, "q"),
    "k": (BlockType.QK, "kv"),
    "v": (BlockType.VO, None),
    "gate": (BlockType.VO, None),  # an attention output gate scales the value path
    "up": (BlockType.FFN, None),
}
Interleave = Literal["none", "head", "group"]
# builds the pieces of a family whose layout no table column describes: (shape, heads) -> (pieces, repeat)
Special = Callable[[tuple[int, ...], HeadCounts], tuple[tuple[Piece, ...], int]]


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    Attributes:
        match: glob over the whole dotted name (``*`` any text, ``{a,b}`` either); a leading ``*.`` also matches nothing.
        block: the block type of the whole parameter; None for a fused one.
        heads: "q" or "kv" where Adam-mini's segments are heads of that kind; else one segment per output unit.
        split: roles of a fused weight in order, e.g. ("q", "k", "v").
        interleave: how a fused weight orders them: "none" all q then all k then all v; "head" per head; "group" per
            query group, with the query heads of the group together.
        transposed: the output axis is the last one.
        batch_dims: leading dimensions of stacked experts.
        vector: matches only parameters of at most one dimension (norm rules, so that no matrix is caught).
        special: for layouts that need more than the above.
        undecayed: no weight decay whatever its shape (a state-space model's time scales).
        view: the shape as which the model's forward reads the parameter, where that is another than it is stored in.
    """

    match: str
    block: BlockType | None = None
    heads: str | None = None
    split: tuple[str, ...] = ()
    interleave: Interleave = "none"
    transposed: bool = False
    batch_dims: int = 0
    vector: bool = False
    special: Special | None = None
    undecayed: bool = False
    view: Callable[[tuple[int, ...], HeadCounts], tuple[int, ...]] | None = None

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        alternatives = re.escape(self.match).replace(r"\*", ".*").replace(r"\{", "(?:").replace(r"\}", ")")
        return re.compile(alternatives.replace(",", "|") + r"\Z")

    def matches(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.vector and len(shape) > 1:
            return False
        return any(self.pattern.match(text) is not None for text in (name, "." + name))

    def layout(self, name: str, shape: tuple[int, ...], heads: HeadCounts | None) -> ParamLayout:
        """The layout this rule gives a parameter of that name and shape.

        Raises:
            BlockError: the layout needs head counts that are not known, or they contradict the shape.
        """
        if self.view is not None:
            shape = self.view(shape, _need(heads, name, self))
        # A bias has no input axis: it is a vector per stacked matrix, its output axis the last one either way.
        vector = self.undecayed or len(shape) <= 1 + self.batch_dims
        kind = NORM if self.block is BlockType.NORM else BIAS if vector else MATRIX
        base = ParamLayout(name, shape, (Piece(BlockType.FFN, _outputs(shape, self.transposed and kind == MATRIX,
                                                                        self.batch_dims)),),
                           transposed=self.transposed and kind == MATRIX, batch_dims=self.batch_dims, kind=kind)
        if self.special is not None:
            pieces, repeat = self.special(shape, _need(heads, name, self))
        elif self.split:
            pieces, repeat = self._fused(base, heads)
        else:
            pieces, repeat = (Piece(self.block, base.outputs, self._unit(base, heads), self._role()),), 1
        if kind != MATRIX:  # one second moment per vector (the optimizer offers one per element for biases)
            pieces = tuple(Piece(p.block, p.size, 0, p.role) for p in pieces)
        return ParamLayout(name, shape, pieces, repeat, base.transposed, base.batch_dims, kind)

    def _role(self) -> str:
        return {"q": "q", "kv": "k"}.get(self.heads or "", "")

    def _unit(self, base: ParamLayout, heads: HeadCounts | None) -> int | None:
        if self.heads is None:
            return 1
        return None if heads is None else _divide(base, getattr(heads, self.heads))

    def _fused(self, base: ParamLayout, heads: HeadCounts | None) -> tuple[tuple[Piece, ...], int]:
        if heads is None and self.interleave == "none" and set(self.split) == {"q", "k", "v"}:
            # without head counts only equal thirds are possible; what Adam-mini calls a head stays open
            third = _divide(base, len(self.split))
            return tuple(Piece(ROLES[r][0], third, None if ROLES[r][1] else 1, r) for r in self.split), 1
        counts = _need(heads, base.name, self)
        try:
            return qkv_pieces(base.outputs, counts.q, counts.kv, self.interleave, self.split)
        except BlockError as error:
            raise BlockError(f"{base.name} (shape {base.shape}): {error}") from None


def qkv_pieces(outputs: int, q: int, kv: int, interleave: Interleave = "none",
               split: tuple[str, ...] = ("q", "k", "v")) -> tuple[tuple[Piece, ...], int]:
    """The pieces of a fused attention weight, and how often they repeat.

    Args:
        outputs: its output units.
        q, kv: query heads, and key and value heads.
        interleave, split: as in :class:`Rule`.

    Raises:
        BlockError: the counts contradict each other or the number of output units.
    """
    per = {"q": q, "gate": q, "k": kv, "v": kv}
    parts = sum(per[role] for role in split)
    if outputs % parts:
        raise BlockError(f"{outputs} rows do not divide into {parts} heads; correct the head counts of the model's "
                         f"config or the rule")
    head, groups = outputs // parts, {"none": 1, "head": q, "group": kv}[interleave]
    if any(per[role] % groups for role in split):
        raise BlockError(f"{q} query and {kv} key heads cannot be interleaved per {interleave}; correct the head "
                         f"counts or the rule")
    return tuple(Piece(ROLES[r][0], per[r] // groups * head, head if ROLES[r][1] else 1, r) for r in split), groups


def _outputs(shape: tuple[int, ...], transposed: bool, batch_dims: int) -> int:
    matrix = shape[batch_dims:]
    return (matrix[-1] if transposed else matrix[0]) if matrix else 1


def _divide(base: ParamLayout, parts: int) -> int:
    if base.outputs % parts:
        raise BlockError(f"{base.name}: {base.outputs} rows (shape {base.shape}) do not divide into {parts} heads; "
                         f"correct the head counts of the model's config or the rule")
    return base.outputs // parts


def _need(heads: HeadCounts | None, name: str, rule: Rule) -> HeadCounts:
    if heads is None:
        raise BlockError(f"{name}: the rule {rule.match!r} needs the numbers of heads, and the model has no `config` "
                         f"that states them; pass map_blocks(model, config={{'num_attention_heads': …}})")
    return heads


class UserRule(BaseModel):
    """A rule as users write it in JSON: ``{"match": "*.adapter.*", "block": "ffn"}``, or with ``split`` for a fused weight."""

    model_config = ConfigDict(extra="forbid")

    match: str
    block: str | None = None
    heads: Literal["q", "kv"] | None = None
    split: tuple[str, ...] = ()
    interleave: Interleave = "none"
    transposed: bool = False
    batch_dims: int = 0

    @field_validator("block")
    @classmethod
    def _known_block(cls, value: str | None) -> str | None:
        return value if value is None else block_type(value).value

    @field_validator("split")
    @classmethod
    def _known_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [role for role in value if role not in ("q", "k", "v", "gate")]
        if unknown:
            raise BlockError(f"unknown role {unknown[0]!r} in split; use q, k, v, gate")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> UserRule:
        if (self.block is None) == (not self.split):
            raise BlockError(f"rule {self.match!r}: give either \"block\" or \"split\"")
        return self

    def rule(self) -> Rule:
        block = None if self.block is None else block_type(self.block)
        return Rule(self.match, block, self.heads, self.split, self.interleave, self.transposed, self.batch_dims)


def user_rules(entries: Iterable[Rule | dict] | None) -> tuple[Rule, ...]:
    """Rules as given by a user, checked.

    Raises:
        BlockError: an entry with an unknown key, block type or role.
    """
    rules = []
    if isinstance(entries, (str, dict)):
        raise BlockError(f"block_rules must be a list of rules like {{\"match\": \"*.adapter.*\", \"block\": \"ffn\"}}, "
                         f"got {entries!r}")
    for entry in entries or ():
        if isinstance(entry, Rule):
            rules.append(entry)
            continue
        try:
            rules.append(UserRule.model_validate(entry).rule())
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise BlockError(f"block rule {entry!r}: {where + ': ' if where else ''}"
                             f"{problem['msg'].removeprefix('Value error, ')}") from None
    return tuple(rules)
