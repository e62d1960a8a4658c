"""The unfused twin of the tiny Megatron models: one process, one leaf per q, k, v, gate and up, torch's own optimizers.

Which rows of a fused weight are what is written out here by hand from Megatron's forward passes; nothing of blockwise_lr
is used.
"""
from __future__ import annotations

import re

import torch

from megatron_door.layouts import HEADS, LENGTH
from twins import RATIOS, Leaf

BLOCK_RATIOS = {**RATIOS, "router": 6.0}
_BLOCKS = [("norm", r"layernorm"), ("embedding", r"word_embeddings|position_embeddings"), ("head", r"output_layer"),
           ("qk", r"#[qk]$"), ("vo", r"#v$|linear_proj"), ("router", r"router"), ("ffn", r"linear_fc")]


class MegatronTwin:
    """The leaves of a single-process GPTModel; has what the optimizers of :mod:`twins` ask of a twin."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.groups = model.config.num_query_groups
        self.leaves: dict[str, Leaf] = {}
        for name, p in model.named_parameters():
            for part, tensor in self._split(name, p.detach().float()).items():
                block = next(block for block, pattern in _BLOCKS if re.search(pattern, part))
                bias = name.endswith("bias")
                segments = 1 if block == "norm" else 0 if bias else tensor.shape[0]
                if block == "qk" and not bias:
                    segments = HEADS if part.endswith("#q") else self.groups
                self.leaves[part] = Leaf(tensor.clone().requires_grad_(), block, not bias and block != "norm", segments)

    def _split(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        if "linear_qkv" not in name:
            return {name: value}
        per_group = value.unflatten(0, (self.groups, HEADS // self.groups + 2, -1))
        return {f"{name}#q": per_group[:, :-2].flatten(0, 2), f"{name}#k": per_group[:, -2].flatten(0, 1),
                f"{name}#v": per_group[:, -1].flatten(0, 1)}

    def values(self) -> dict[str, torch.Tensor]:
        """The fused parameters, built from the leaves (differentiable)."""
        joined = {}
        for name, _ in self.model.named_parameters():
            if name in self.leaves:
                joined[name] = self.leaves[name].tensor
                continue
            q, k, v = (self.leaves[f"{name}#{role}"].tensor.unflatten(0, (self.groups, -1)) for role in "qkv")
            joined[name] = torch.cat([q, k, v], 1).flatten(0, 1)
        return joined

    def backward(self, ids: torch.Tensor, weight: float, dtype: torch.dtype = torch.float32) -> float:
        """Adds the gradients of weight * mean loss on token ids (batch, LENGTH + 1); returns the loss."""
        values = {name: value.to(dtype) for name, value in self.values().items()}
        losses = torch.func.functional_call(self.model, values, model_inputs(ids), {"labels": ids[:, 1:].contiguous()})
        loss = losses.float().mean()
        (loss * weight).backward()
        return float(loss.detach())

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_([leaf.tensor for leaf in self.leaves.values()], norm)


def model_inputs(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, positions, mask) of token ids (batch, LENGTH + 1), as GPTModel takes them."""
    positions = torch.arange(LENGTH).expand(ids.shape[0], LENGTH).contiguous()
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    return ids[:, :-1].contiguous(), positions, mask
