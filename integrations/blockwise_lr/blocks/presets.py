"""Ratios with a name: ``"block_lr_ratios": "uniform"``, or ``{"preset": "uniform", "embedding": 10}`` to change some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .types import DEFAULT_RATIO_OF, PAPER_RATIOS, BlockError, BlockType, block_values, shown


@dataclass(frozen=True)
class Preset:
    """Ratios, and where they come from.

    Attributes:
        ratios: peak learning rate of block types over ``lr``; the others follow (see types.DEFAULT_RATIO_OF).
        source: who found them, on what.
    """

    ratios: Mapping[BlockType, float]
    source: str


_ONES = dict.fromkeys(PAPER_RATIOS, 1.0)

PRESETS: Mapping[str, Preset] = {
    "paper": Preset(PAPER_RATIOS, "arXiv 2502.19002, tuned by hand on one LLaMA of 0.25B parameters; the default"),
    "uniform": Preset(_ONES, "one learning rate for all, as AdamW; what everything else is to be compared with"),
    "embedding": Preset(
        {**_ONES, BlockType.EMBEDDING: 10.0},
        "embedding and head at ten times the rate of all the rest: the best of what was tried on LLaMAs of 0.3M "
        "parameters in up to 756 steps (examples/reproduce, arm embedding-head-10)",
    ),
}


def lr_ratios(
    values: str | Mapping[str, Any] | None = None, own: Mapping[str, float | None] = MappingProxyType({})
) -> dict[BlockType | str, float]:
    """The ratio of every block type: the given one, else the preset's (the paper's where none is named), else that of a
    similar block type. Behind them, that of every block of the user's own: the given one, else its rule's.

    Args:
        values: a preset's name, or ratios by block type, among them perhaps ``preset`` with such a name.
        own: name of a block of the user's own -> the ratio that its rule states, None where it states none.

    Raises:
        BlockError: an unknown name, a ratio that is negative, not finite or not a number, a ratio of 0 (to freeze a
            block, set requires_grad=False), or none for a block of the user's own.
    """
    given: Any = {"preset": values} if isinstance(values, str) else values
    name: Any = "paper"
    if isinstance(given, Mapping) and "preset" in given:
        name, given = given["preset"], {block: ratio for block, ratio in given.items() if block != "preset"}
        if not isinstance(name, str) or name not in PRESETS:
            raise BlockError(
                f"block_lr_ratios names the preset {shown(name)}; use one of {', '.join(PRESETS)}, or ratios by block type"
            )
    said = block_values(given, "block_lr_ratios", positive=True, own=own)
    ratios: dict[BlockType | str, float] = dict(PRESETS[name].ratios) | said
    found: dict[BlockType | str, float] = {
        block: ratios[block] if block in ratios else ratios[DEFAULT_RATIO_OF[block]] for block in BlockType
    }
    for block, ratio in own.items():
        stated = said.get(block, ratio)
        if stated is None:
            raise BlockError(
                f"the block {block!r} of block_rules has no ratio; add lr_ratio to its rule, or name it in block_lr_ratios"
            )
        found[block] = stated
    return found
