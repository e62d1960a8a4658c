"""Naming tables, one per model family; the first rule that matches a name is used.

The family is the ``model_type`` of the model's config. Its own rules come first, then GENERIC, with the names that most
models share; a model whose names and layouts are all generic needs no table. A new family is one entry in one of these
tables and one row in the tests:

    generic.py   names that mean the same wherever they appear
    fused.py     q, k and v in one weight
    moe.py       routers, stacked experts, multi-head latent attention
    megatron.py  Megatron's own models
    encoders.py  BERT, T5, ViT and other encoders
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
