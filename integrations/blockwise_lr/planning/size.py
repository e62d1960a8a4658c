"""How large a model is for a plan: parameters, those a token passes, and floating-point operations per token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks import BlockType, map_blocks
from ..blocks.layout import MATRIX

_EXPERT = re.compile(r"(?:^|\.)(?:local_)?experts(?:\.|$)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_router_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Size:
    """A model's size.

    Attributes:
        parameters: all of them.
        body: weights of matrices a token passes, without the input embedding and the output layer; of experts, those chosen.
        head: weights of the output layer; where it is tied, the embedding's. 0 without one.
        attended: rows of all q projections together: layers times heads times their size.
    """

    parameters: int
    body: float
    head: int
    attended: int

    @property
    def active(self) -> float:
        """N of the laws: what a token passes, the output layer among it and the input embedding not."""
        return self.body + self.head

    def flops_per_token(self, length: int) -> float:
        """Of one training step, per token of sequences of a length: 6 per active weight, and causal attention."""
        return 6 * self.active + 6 * length * self.attended


def model_size(model: torch.nn.Module, *, rules: Iterable[dict] | None = None) -> Size:
    """The size of a decoder, also one on the meta device.

    Args:
        model: whose map is strict but for ``rules``.

    Raises:
        BlockError: a parameter that no rule maps.
    """
    block_map = map_blocks(model, rules=rules, family=getattr(model, "blockwise_family", None))
    share = _chosen_share(getattr(model, "config", None))
    body, head, table, attended = 0.0, 0, 0, 0
    tied = _tied(model)
    for name, layout in block_map.items():
        if layout.kind != MATRIX:
            continue
        for block, numel in layout.block_numel().items():
            if block is BlockType.EMBEDDING:
                table = numel if not table or name in tied else table  # the tied one, else the first: the tokens'
            elif block is BlockType.HEAD:
                head += numel
            else:
                body += numel * (share if _EXPERT.search(name) else 1.0)
        attended += sum(piece.size for piece in layout.pieces if piece.role == "q") * layout.repeat * layout.batch
    parameters = sum(layout.numel for layout in block_map.values())
    return Size(parameters, body, head or table, attended)


def _tied(model: torch.nn.Module) -> set[str]:
    """First names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {found[0] for found in names.values() if len(found) > 1}


def _chosen_share(config: Any) -> float:
    """Experts a token goes to, over all; 1 where the config says neither."""
    if config is None:
        return 1.0
    config = getattr(config, "get_text_config", lambda: config)()
    found = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    experts = next((value for name in _EXPERTS if (value := found(name))), None)
    chosen = next((value for name in _CHOSEN if (value := found(name))), None)
    return 1.0 if not experts or not chosen else chosen / experts
