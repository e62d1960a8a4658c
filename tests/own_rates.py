"""Rules that give rates of their own, and what each leaf of an unfused twin trains at by them, written out by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from twins import Leaf

# the attention of the first layer is a block of its own; everything else decays from layer to layer
RULES = [
    {"match": "*.{self_attn,attn,attention,self_attention}.*", "layers": "first", "name": "low", "lr_ratio": 0.5},
    {"match": "*", "layer_decay": 0.5},
]
OWN_RATIO, DECAY = 0.5, 0.5
_LAYER = re.compile(r"\b(?:h|layers)\.(\d+)\.")


def rated(leaves: Mapping[str, Leaf], ratios: Mapping[str, float], layers: int = 2) -> dict[str, tuple[float, float]]:
    """Gives the leaves blocks that tell their rates; returns (ratio, factor) of each of these.

    Layer-wise decay as in BEiT and ELECTRA: the head and what else is behind the last layer have factor 1, the last layer
    has DECAY, the embeddings DECAY ** (layers + 1).
    """
    found: dict[str, tuple[float, float]] = {}
    for name, leaf in leaves.items():
        layer = _LAYER.search(name)
        if layer and int(layer.group(1)) == 0 and re.search(r"attn|attention", name) and "norm" not in name:
            ratio, factor, leaf.block = OWN_RATIO, 1.0, "low"
        else:
            below = layers - int(layer.group(1)) if layer else layers + 1 if leaf.block == "embedding" else 0
            ratio, factor = ratios[leaf.block], DECAY**below
            leaf.block = f"{leaf.block} {below}"
        found[leaf.block] = ratio, factor
    return found


def rate_of(schedule: Any, rate: tuple[float, float]) -> float:
    """A leaf's learning rate: that of its ratio by the schedule, times its factor."""
    ratio, factor = rate
    return factor * schedule(ratio)
