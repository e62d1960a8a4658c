"""Transformers of plain modules with their norms in every place, written out by hand; a factory takes the number of layers."""

import functools

from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 64, 4, 61


class Attention(nn.Module):
    def __init__(self, qk_norm):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(WIDTH // HEADS) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, kind, alpha, qk_norm):
        super().__init__()
        self.kind, self.alpha = kind, alpha
        self.attention, self.mlp = Attention(qk_norm), MLP()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(0 if kind == "none" else 4))

    def forward(self, x):
        return self.added(self.added(x, self.attention, 0), self.mlp, 2)

    def added(self, x, sublayer, first):
        if self.kind == "none":
            return x + sublayer(x)
        before, behind = self.norms[first], self.norms[first + 1]
        if self.kind == "pre":
            return x + sublayer(before(x))
        if self.kind == "post":
            return behind(self.alpha * x + sublayer(x))
        return x + behind(sublayer(before(x) if self.kind == "sandwich" else x))


class Transformer(nn.Module):
    def __init__(self, layers, kind, qk_norm=False, deep=False, std=None):
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer(kind, (2 * layers) ** 0.25 if deep else 1.0, qk_norm) for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p) if std is None or "layers" not in name else nn.init.normal_(p, 0, std)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x) if self.layers[0].kind != "post" else x)


pre, post, none = (functools.partial(Transformer, kind=kind) for kind in ("pre", "post", "none"))
sandwich, reordered = (functools.partial(Transformer, kind=kind, qk_norm=True) for kind in ("sandwich", "reordered"))
deepnorm = functools.partial(Transformer, kind="post", deep=True)


def uneven(layers):
    """The first layer's feed-forward output is thirty times as large as the others'."""
    model = reordered(layers)
    model.layers[0].norms[3].weight.data *= 30
    return model


def shallow():
    """A factory that knows one depth."""
    return post(2)


def without_layers():
    return nn.Sequential(nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS))


def without_logits():
    model = pre(2)
    model.forward = lambda ids: Transformer.forward(model, ids).sum()
    return model
