"""Rules of the user's own as JSON objects: checked, and refused in a sentence that names the rule, the key and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .depth import WANTED as _LAYERS
from .depth import Layers
from .globs import checked_glob
from .rules import ROLES, OwnRate, Rule
from .types import BlockError, BlockType, block_type, finite, shown

_BLOCKS = ", ".join(block.value for block in BlockType)
_USER_ROLES = ("q", "k", "v", "gate")
_SHARED_ROLES = (*ROLES, *(block.value for block in BlockType))
_TAKEN = (*(block.value for block in BlockType), "preset")  # names in block_lr_ratios
_MOST_DIMS = 64  # no tensor has more
_FACTOR = "give a finite number above 0, without quotes"
# how to write the value of each key of a user rule, for error messages
_WANTED = {
    "match": 'give a glob over parameter names, as in "*.adapter.*"',
    "block": f"use one of {_BLOCKS}",
    "heads": 'use "q" or "kv"',
    "split": 'give a list of roles in their order, as in ["q", "k", "v"], or their shares, as in {"q": 4, "k": 1, "v": 1}',
    "interleave": 'use "none", "head" or "group", or give the number of repeats, as in 4',
    "transposed": "write true or false, without quotes",
    "batch_dims": f"give a whole number from 0 to {_MOST_DIMS}, without quotes",
    "q_heads": "give the number of query heads, a whole number above 0",
    "kv_heads": "give the number of key and value heads, a whole number above 0",
    "layers": _LAYERS,
    "name": 'give a word without spaces or "=", as in "vision"',
    "lr_ratio": f"{_FACTOR}: the peak learning rate over lr",
    "lr_scale": f"{_FACTOR}: what multiplies the rates of the block types",
    "layer_decay": f"{_FACTOR}: the factor from each layer to the one below",
}
_EXAMPLE = '{"match": "*.adapter.*", "block": "ffn"}'
_WORD = re.compile(r"[^\s=]+\Z")
_PLAIN = re.compile(r"\*?\.?([\w.]+?)\.?\*?\Z")
_FACTORS = ("lr_ratio", "lr_scale", "layer_decay")
_RATE_KEYS = ("name", *_FACTORS)

_Count = Annotated[int, Field(ge=1)]


class UserRule(BaseModel):
    """A rule in JSON. Validation is strict: values of other types are refused and not converted, so that ``"false"`` is
    not true.

    It says what parameters are (``{"match": "*.adapter.*", "block": "ffn"}``, or ``split`` for a fused weight), what rate
    they train at (``{"match": "*.vision_tower.*", "lr_ratio": 0.1}``), or both.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    match: str
    block: str | None = None
    heads: Literal["q", "kv"] | None = None
    split: tuple[str, ...] | dict[str, _Count] = ()
    interleave: Literal["none", "head", "group"] | _Count = "none"
    transposed: bool = False
    batch_dims: int = Field(0, ge=0, le=_MOST_DIMS)
    q_heads: _Count | None = None
    kv_heads: _Count | None = None
    layers: str | None = None
    name: str | None = None
    lr_ratio: float | None = None
    lr_scale: float | None = None
    layer_decay: float | None = None

    @field_validator("match")
    @classmethod
    def _glob(cls, value: str) -> str:
        return checked_glob(value)

    @field_validator("block", mode="before")
    @classmethod
    def _known_block(cls, value: object) -> object:
        return block_type(value).value if isinstance(value, str) else value

    @field_validator("split", mode="before")
    @classmethod
    def _known_roles(cls, value: object) -> object:
        if not isinstance(value, (list, tuple, Mapping)) or not all(isinstance(role, str) for role in value):
            return tuple(value) if isinstance(value, list) else value  # refused by its type
        known = _SHARED_ROLES if isinstance(value, Mapping) else _USER_ROLES
        unknown = [role for role in value if role not in known]
        if unknown:
            raise BlockError(f"unknown role {unknown[0]!r} in split; use {', '.join(known)}")
        if len(set(value)) < len(value):
            raise BlockError(f"split names a role twice: {', '.join(value)}; name each part of the fused weight once")
        return dict(value) if isinstance(value, Mapping) else tuple(value)

    @field_validator("layers")
    @classmethod
    def _known_layers(cls, value: str | None) -> str | None:
        return value if value is None else Layers(value).text

    @field_validator("name")
    @classmethod
    def _word(cls, value: str | None) -> str | None:
        if value is not None and (not _WORD.match(value) or not value.isprintable()):
            raise BlockError(f"{shown(value)} cannot name a block; {_WANTED['name']}")
        if value is not None and value in _TAKEN:
            raise BlockError(f"{value!r} is a name that block_lr_ratios has already; choose another")
        return value

    @field_validator(*_FACTORS, mode="before")
    @classmethod
    def _factor(cls, value: object, info: ValidationInfo) -> object:
        number = finite(value)
        if value is not None and (number is None or number <= 0):
            raise BlockError(f"is {shown(value)}; {_WANTED[str(info.field_name)]}")
        return number

    @model_validator(mode="after")
    def _goes_together(self) -> UserRule:
        if self.block is not None and self.split:
            raise BlockError('give either "block" or "split"')
        if self.block is None and not self.split:
            self._says_a_rate_alone()
        if self.heads is not None and self.split:
            raise BlockError('"heads" goes with "block"; leave it out beside "split", whose roles say it')
        if self.interleave != "none" and not self.split:
            raise BlockError('"interleave" goes with "split"; leave it out beside "block"')
        if isinstance(self.split, dict) and self.interleave in ("head", "group"):
            raise BlockError(
                f'"interleave": {self.interleave!r} follows from head counts, and "split" states shares; give the number '
                f"of repeats"
            )
        if self.lr_scale is not None and (self.lr_ratio is not None or self.name is not None):
            raise BlockError(
                '"lr_scale" multiplies the block types\' own rates, and "name" and "lr_ratio" make a block with one rate '
                "of its own; give one of both"
            )
        return self

    def _says_a_rate_alone(self) -> None:
        if all(getattr(self, key) is None for key in _RATE_KEYS):
            raise BlockError('give either "block" or "split", or a rate: "lr_ratio", "lr_scale" or "layer_decay"')
        for key in ("heads", "q_heads", "kv_heads"):
            if getattr(self, key) is not None:
                raise BlockError(f'"{key}" says something of a layout; give "block" or "split" beside it')

    def rule(self) -> Rule:
        """The rule that this JSON object describes."""
        shares = tuple(self.split.values()) if isinstance(self.split, dict) else ()
        repeats = self.interleave if isinstance(self.interleave, int) else 0
        return Rule(
            self.match,
            None if self.block is None else block_type(self.block),
            self.heads,
            tuple(self.split),
            self.interleave if isinstance(self.interleave, str) else "none",
            self.transposed,
            self.batch_dims,
            shares=shares,
            repeats=repeats,
            head_counts=(self.q_heads, self.kv_heads),
            layers=None if self.layers is None else Layers(self.layers),
            rate=self._rate(),
        )

    def _rate(self) -> OwnRate | None:
        if all(getattr(self, key) is None for key in _RATE_KEYS):
            return None
        is_own = self.name is not None or self.lr_ratio is not None
        own = (self.name or _name_of(self.match)) if is_own else ""
        return OwnRate(own, self.lr_ratio, self.lr_scale or 1.0, self.layer_decay)


def _name_of(match: str) -> str:
    """What to call an own block without a name: ``vision_tower`` for ``*.vision_tower.*``, or else the glob as it is."""
    plain = _PLAIN.match(match)
    return plain.group(1) if plain and plain.group(1) not in _TAKEN else match


def user_rules(entries: Iterable[Rule | Mapping[str, Any]] | None) -> tuple[Rule, ...]:
    """Validates user rules.

    Args:
        entries: rules, or mappings in the form of :class:`UserRule`; None: none.

    Raises:
        BlockError: an entry with an unknown key or a value that its key does not accept; the message names both. Or two
            entries that give one block two ratios.
    """
    if entries is None:
        return ()
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise BlockError(f"block_rules must be a list of rules like {_EXAMPLE}, got {shown(entries)}")
    rules = tuple(_checked(entry) for entry in entries)
    own_blocks(rules)
    return rules


def own_blocks(rules: Iterable[Rule]) -> dict[str, float | None]:
    """The blocks of the user's own that rules make: name -> the ratio they state; None where they state none.

    Raises:
        BlockError: two rules give one block two ratios.
    """
    found: dict[str, float | None] = {}
    for rule in rules:
        if rule.rate is None or not rule.rate.own:
            continue
        own, ratio = rule.rate.own, rule.rate.ratio
        before = found.get(own)
        if None not in (before, ratio) and before != ratio:
            raise BlockError(
                f"block_rules give the block {own!r} the lr_ratio {before:g} and {ratio:g}; give one of the rules "
                f'another "name"'
            )
        found[own] = before if ratio is None else ratio
    return found


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
    if key == "match":
        return f"match {shown(problem['input'])} {own}"
    return f"{key} {own}" if key in _FACTORS else f"{key}: {own}" if key else str(own)
