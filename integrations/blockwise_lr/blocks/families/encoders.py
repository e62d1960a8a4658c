"""OPT, whose names have another meaning in other families."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

EMBEDDING, HEAD = BlockType.EMBEDDING, BlockType.HEAD

ENCODERS: dict[str, tuple[Rule, ...]] = {
    "opt": (
        Rule("*.project_in.*", EMBEDDING),  # the two halves of a factored embedding and head
        Rule("*.project_out.*", HEAD),
    ),
}
