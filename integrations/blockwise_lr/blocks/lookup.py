"""The layout of one parameter: by the user's rules, by what its module says of itself, and by the tables of names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .depth import Depths
from .families import family_rules
from .layout import ParamLayout
from .names import low_rank_factor, plain_name, plain_names
from .rates import applies, needs_depths
from .rules import Rule
from .structure import Structure
from .types import BlockError, BlockType

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def depths_of(
    shapes: Mapping[str, tuple[int, ...]],
    own: tuple[Rule, ...],
    structure: Structure,
    aliases: Iterable[list[str]],
    names: Iterable[str],
) -> Depths | None:
    """The depths of the model's parameters, by what they are without the rules that depend on them; None where no rule
    does. ``names`` are those of all parameters."""
    if not needs_depths(own):
        return None
    rules = tuple(rule for rule in own if rule.layers is None)
    blocks = {}
    for same in aliases:
        layout = alias_layout(same, shapes, rules, structure, None, set())
        blocks[plain_name(same[0])] = () if layout is None else layout.blocks
    return Depths(blocks, map(plain_name, names))


def alias_layout(
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    own: tuple[Rule, ...],
    structure: Structure,
    depths: Depths | None,
    used: set[Rule],
) -> ParamLayout | None:
    """The layout of a parameter of these names, under the first one; None where no rule maps any of them."""
    candidates = [_layout(name, shapes[name], own, structure, depths, used) for name in names]
    known = [layout for layout in candidates if layout is not None]
    tied = next((layout for layout in known if BlockType.EMBEDDING in layout.blocks), None)
    layout = tied or (known[0] if known else None)
    return None if layout is None else replace(layout, name=names[0])


def _layout(
    name: str,
    shape: tuple[int, ...],
    own: tuple[Rule, ...],
    structure: Structure,
    depths: Depths | None,
    used: set[Rule],
) -> ParamLayout | None:
    factor, context = low_rank_factor(name), structure.context(name)
    mine = (rule for rule in own if rule.is_layout and applies(rule, name, shape, depths))
    rule = next(mine, None) or _known_rule(name, shape, structure, context.family)
    if rule is None:
        return None
    used.add(rule)
    if factor == "A":
        # A feeds all output rows of W; for a fused QKV that is vo, whose learning rate is the smallest
        return Rule(rule.match, rule.block or BlockType.VO).layout(name, shape, context.heads)
    if name in structure.transposed and not rule.transposed:
        rule = replace(rule, transposed=True)
    elif rule.split and not rule.transposed and len(shape) == 2 and shape[1] == 3 * shape[0]:
        raise BlockError(
            f"{name}: a fused weight of shape {shape} looks transposed (Conv1D), which its name alone does "
            f"not tell; pass block_map=map_blocks(model)"
        )
    return rule.layout(name, shape, context.heads)


def _known_rule(name: str, shape: tuple[int, ...], structure: Structure, family: str | None) -> Rule | None:
    """The rule for a parameter of which the user says nothing: what its module says of itself, the family's, or a general
    one."""
    known = structure.known.get(name)
    if known is not None and known.matches(name, shape):
        return known
    classes = structure.classes_of(name)
    # layers differ in their numbers only, which no rule of a table names
    names = tuple(dict.fromkeys(_NUMBER.sub("0", text) for text in plain_names(name)))
    return _table_rule(family, names, len(shape), classes)


@functools.lru_cache(maxsize=1 << 16)
def _table_rule(family: str | None, names: tuple[str, ...], dims: int, classes: str) -> Rule | None:
    shape = (1,) * dims
    return next(
        (rule for rule in family_rules(family) if any(rule.matches(name, shape, classes) for name in names)), None
    )
