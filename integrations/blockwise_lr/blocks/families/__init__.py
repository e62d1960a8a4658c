"""Naming tables, one per model family, and what names and classes mean everywhere; the first rule that matches is used.

The family is the ``model_type`` of the model's config. Its own rules come first, then GENERIC; a model whose names and
layouts are all generic needs no table. A new family is one entry in one of these tables and one row in the tests:

    generic.py       the order of all that is general:
    mixers.py            state-space models, linear attention, recurrences
    attention.py         q, k, v, output, gates, what enters the scores
    feed_forward.py      feed-forward networks, experts, routers, convolutions
    scales.py            LayerScale, residual gates
    ends.py              embeddings, tokens, patches, projectors, heads
    fused.py         q, k and v in one weight, in an order of the family's own
    moe.py           stacked experts stored inputs first
    megatron.py      Megatron's own models
    encoders.py      OPT
"""

from __future__ import annotations

from ..rules import Rule
from .encoders import ENCODERS
from .fused import FUSED
from .generic import GENERIC
from .megatron import MEGATRON
from .moe import MOE

__all__ = ["FAMILIES", "GENERIC", "family_rules"]

FAMILIES: dict[str, tuple[Rule, ...]] = {**FUSED, **MOE, **ENCODERS, **MEGATRON}


def family_rules(family: str | None) -> tuple[Rule, ...]:
    """The rules of a family, then the generic ones; only the generic ones for None or an unknown family."""
    return FAMILIES.get(family or "", ()) + GENERIC
