"""The unfused twin of the tiny Megatron models: one process, one leaf per q, k, v, gate and up, torch's own optimizers.

Which rows of a fused weight are what is written out here by hand from Megatron's forward passes; nothing of
blockwise_lr is used.
"""

from __future__ import annotations

import re

import torch
from megatron_door.layouts import HEADS, LENGTH
from twins import RATIOS, Leaf

BLOCK_RATIOS = {**RATIOS, "router": 6.0, "ssm": 6.0}
_BLOCKS = [
    ("norm", r"layernorm|norm\.weight$"),
    ("embedding", r"word_embeddings|position_embeddings"),
    ("head", r"output_layer"),
    ("qk", r"#([qk]|rotary)$|linear_q_"),
    ("vo", r"#(v|latent)$|linear_proj"),
    ("router", r"router"),
    ("ffn", r"linear_fc|eh_proj"),
    ("ssm", r"\.(in_proj|out_proj|conv1d|A_log|dt_bias)"),
]


class MegatronTwin:
    """The leaves of a single-process GPTModel; has what the optimizers of :mod:`twins` ask of a twin.

    Args:
        model: as it starts.
        vector_biases: Adam-mini has one second moment per vector of biases, and not one per element.
    """

    def __init__(self, model: torch.nn.Module, vector_biases: bool = False) -> None:
        self.model = model
        self.config = model.config
        self.leaves: dict[str, Leaf] = {}
        for name, p in model.named_parameters():
            for part, tensor in self._split(name, p.detach().float()).items():
                block = next(block for block, pattern in _BLOCKS if re.search(pattern, part))
                bias = name.endswith(("bias", "A_log"))
                segments = (
                    1 if block == "norm" else int(vector_biases) if bias else self._segments(part, tensor.shape[0])
                )
                self.leaves[part] = Leaf(
                    tensor.clone(memory_format=torch.contiguous_format).requires_grad_(),
                    block,
                    not bias and block != "norm",
                    segments,
                )

    def _segments(self, part: str, rows: int) -> int:
        """Query and key weights have a segment per head, the rotary key that all heads share one; others one per row."""
        for ending, count in (
            ("#q", HEADS),
            ("linear_q_up_proj.weight", HEADS),
            ("#k", self.config.num_query_groups),
            ("#rotary", 1),
        ):
            if part.endswith(ending):
                return count
        return rows

    def _pattern(self, name: str) -> tuple[int, dict[str, int]]:
        """Of a fused weight: how often its rows repeat, and the parts of one repeat with their numbers of rows."""
        config = self.config
        if "linear_qkv" in name:
            head = config.kv_channels
            return config.num_query_groups, {"q": HEADS // config.num_query_groups * head, "k": head, "v": head}
        if "linear_kv_up_proj" in name:
            return HEADS, {"k": config.qk_head_dim, "v": config.v_head_dim}
        if "linear_kv_down_proj" in name:
            return 1, {"latent": config.kv_lora_rank, "rotary": config.qk_pos_emb_head_dim}
        return 1, {}

    def _split(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        repeats, parts = self._pattern(name)
        if not parts:
            return {name: value}
        values = value.unflatten(0, (repeats, -1)).split(list(parts.values()), 1)
        return {f"{name}#{part}": value.flatten(0, 1) for part, value in zip(parts, values)}

    def values(self) -> dict[str, torch.Tensor]:
        """The fused parameters, built from the leaves (differentiable)."""
        joined = {}
        for name, _ in self.model.named_parameters():
            repeats, parts = self._pattern(name)
            leaves = [self.leaves[f"{name}#{part}"].tensor.unflatten(0, (repeats, -1)) for part in parts]
            joined[name] = torch.cat(leaves, 1).flatten(0, 1) if parts else self.leaves[name].tensor
        return joined

    def backward(self, ids: torch.Tensor, weight: float, dtype: torch.dtype = torch.float32) -> float:
        """Adds the gradients of weight * mean loss on token ids (batch, LENGTH + 1); returns the loss."""
        from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

        MTPLossAutoScaler.set_loss_scale(torch.tensor(weight))  # of the loss on the token after the next
        values = {name: value.to(dtype) for name, value in self.values().items()}
        losses = torch.func.functional_call(self.model, values, model_inputs(ids), {"labels": ids[:, 1:].contiguous()})
        loss = losses.float().mean()
        (loss * weight).backward()
        return float(loss.detach())

    def set_gradients(self, gradients: dict[str, torch.Tensor]) -> None:
        """Gives the leaves the gradients of the fused parameters."""
        for name, gradient in gradients.items():
            for part, value in self._split(name, gradient).items():
                self.leaves[part].tensor.grad = value.clone()

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_([leaf.tensor for leaf in self.leaves.values()], norm)


def model_inputs(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, positions, mask) of token ids (batch, LENGTH + 1), as GPTModel takes them."""
    positions = torch.arange(LENGTH).expand(ids.shape[0], LENGTH).contiguous()
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    return ids[:, :-1].contiguous(), positions, mask
