"""A byte-level Transformer with its norms behind the additions (post-LN, 2017) or in front of the sublayers (pre-LN)."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, BYTES = 64, 4, 256


class Attention(nn.Module):
    """Causal, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Four times as wide inside, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.up_proj(x)))


class Layer(nn.Module):
    """Attention and a feed-forward network, each with an addition and a norm."""

    def __init__(self, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.attention, self.mlp = Attention(), MLP()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.placement == "pre":
            x = x + self.attention(self.attention_norm(x))
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))


class Transformer(nn.Module):
    """Xavier's initialization, as in arXiv 2002.04745, and sinusoidal positions."""

    def __init__(self, layers: int, placement: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(BYTES, WIDTH)
        self.layers = nn.ModuleList(Layer(placement) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH) if placement == "pre" else nn.Identity()
        self.lm_head = nn.Linear(WIDTH, BYTES, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        nn.init.normal_(self.embed_tokens.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, BYTES) of bytes (batch, length)."""
        places = torch.arange(ids.shape[1])[:, None] / 1e4 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        x = self.embed_tokens(ids) + torch.stack([places.sin(), places.cos()], -1).flatten(-2)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


# what ``blockwise-lr diagnose examples.norm_placement.model:post`` takes
pre, post = functools.partial(Transformer, placement="pre"), functools.partial(Transformer, placement="post")
