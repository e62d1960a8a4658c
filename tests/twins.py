"""Small real models and their unfused twins: what one process does with one torch.optim.AdamW group per block type.

The twins know nothing of blockwise_lr: which rows of a fused weight are q, k or v is written out here by hand, from the
models' own forward passes, and the optimizers are torch's AdamW and a loop over Adam-mini's segments.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

RATIOS = {"embedding": 10.0, "head": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0}  # the paper's
DEFAULT_RATIOS = {"embedding": 10.0, "head": 10.0, "qk": 1.0, "ffn": 1.0, "vo": 1.0, "norm": 1.0}
VOCABULARY = 61


def llama(tied: bool = False) -> torch.nn.Module:
    """Grouped-query attention: 4 query heads, 2 key heads."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def llama_tied() -> torch.nn.Module:
    return llama(tied=True)


def gpt2() -> torch.nn.Module:
    """Fused and transposed c_attn, tied embedding."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2,
            n_embd=24,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=32,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def gpt_neox() -> torch.nn.Module:
    """q, k and v fused per head."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=44,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama,
    "llama_tied": llama_tied,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
}


def make(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = MODELS[kind]()
    with torch.no_grad():  # biases start at 0, where a relative difference says nothing
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
    return model


@dataclass
class Leaf:
    """A parameter of the twin.

    Attributes:
        tensor: its values, output rows first, a leaf that requires grad.
        block: its block type.
        decayed: weight decay applies.
        segments: how many equal parts of its rows have a second moment each in Adam-mini; 0: one per element.
    """

    tensor: torch.Tensor
    block: str
    decayed: bool
    segments: int


_BLOCKS = [
    ("embedding", r"embed_tokens|wte|wpe|embed_in"),
    ("head", r"lm_head|embed_out"),
    ("norm", r"norm|ln_"),
    ("qk", r"[qk]_proj|#[qk]"),
    ("vo", r"v_proj|o_proj|#v|attn\.c_proj|attention\.dense"),
    ("ffn", r"mlp"),
]


def _block(name: str) -> str:
    return next(block for block, pattern in _BLOCKS if re.search(pattern, name))


class Twin:
    """The unfused model in one process."""

    def __init__(self, kind: str, model: torch.nn.Module) -> None:
        self.kind = kind
        self.model = model
        self.heads = 4
        self.kv_heads = 2 if kind.startswith("llama") else 4
        self.leaves: dict[str, Leaf] = {}
        for name, p in model.named_parameters():
            for part, tensor in self._split(name, p.detach()).items():
                self.leaves[part] = self._leaf(
                    part, tensor.clone(memory_format=torch.contiguous_format).requires_grad_()
                )

    def _leaf(self, name: str, tensor: torch.Tensor) -> Leaf:
        bias, norm = name.split("#")[0].endswith("bias"), _block(name) == "norm"
        if norm:
            segments = 1
        elif bias:
            segments = 0
        elif _block(name) == "qk":
            segments = self.kv_heads if re.search(r"k_proj|#k", name) else self.heads
        else:
            segments = tensor.shape[0]
        return Leaf(tensor, _block(name), not (bias or norm), segments)

    def _split(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a parameter, each with its output rows first."""
        if self.kind == "gpt2" and re.search(r"attn\.|mlp\.", name) and value.dim() == 2:
            value = value.T  # Conv1D computes x W: columns are outputs
        if "c_attn" in name:
            return {f"{name}#{role}": part for role, part in zip("qkv", value.chunk(3, 0))}
        if "query_key_value" in name:
            per_head = value.unflatten(0, (self.heads, 3, -1))
            return {f"{name}#{role}": per_head[:, i].flatten(0, 1) for i, role in enumerate("qkv")}
        return {name: value}

    def values(self) -> dict[str, torch.Tensor]:
        """The fused model's parameters, built from the leaves (differentiable)."""
        joined = {}
        for name, p in self.model.named_parameters():
            if name in self.leaves:
                value = self.leaves[name].tensor
            else:
                parts = [self.leaves[f"{name}#{role}"].tensor for role in "qkv"]
                if "query_key_value" in name:
                    value = torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], 1).flatten(0, 2)
                else:
                    value = torch.cat(parts, 0)
            joined[name] = value.T if value.shape != p.shape else value
            if self.kind == "gpt2" and re.search(r"attn\.|mlp\.", name) and value.dim() == 2:
                joined[name] = value.T
        return joined

    def backward(self, ids: torch.Tensor, weight: float, dtype: torch.dtype = torch.float32) -> None:
        """Adds the gradients of weight * loss on token ids (batch, length) to the leaves."""
        values = {name: value.to(dtype) for name, value in self.values().items()}
        out = torch.func.functional_call(self.model, values, (ids,), {"labels": ids})
        (out.loss * weight).backward()

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_([leaf.tensor for leaf in self.leaves.values()], norm)


def clip_blocks(twin: Any, limits: dict[str, float | str], norms: dict[str, list[float]] | None = None) -> None:
    """torch's own clipping, of the leaves of a block type at a time; "90%": at numpy's percentile of all norms so far."""
    for block, limit in limits.items():
        leaves = [leaf.tensor for leaf in twin.leaves.values() if leaf.block == block]
        if leaves and isinstance(limit, str):
            assert norms is not None
            grads = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
            norms.setdefault(block, []).append(float(grads.norm()))
            limit = float(np.percentile(norms[block], float(limit[:-1])))
        if leaves:
            torch.nn.utils.clip_grad_norm_(leaves, limit)


def paper_lr(step: int, ratio: float, lr: float, min_lr: float, warmup: int, total: int) -> float:
    """The paper's schedule at update ``step`` from 1: 0 to ratio * lr, then a cosine to min_lr."""
    if step <= warmup:
        return ratio * lr * step / warmup
    return min_lr + (ratio * lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class TorchAdamW:
    """torch.optim.AdamW with a group per block type and decay."""

    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def __init__(
        self, twin: Twin, betas: tuple[float, float], eps: float, decay: float, ratios: dict[str, float]
    ) -> None:
        self.ratios = ratios
        keys = sorted({(leaf.block, leaf.decayed) for leaf in twin.leaves.values()})
        groups = [
            {
                "params": [leaf.tensor for leaf in twin.leaves.values() if (leaf.block, leaf.decayed) == key],
                "weight_decay": decay if key[1] else 0.0,
                "block": key[0],
            }
            for key in keys
        ]
        self.optimizer = self.kind(groups, betas=betas, eps=eps)

    def step(self, lr_of: Callable[[float], float]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr_of(self.ratios[group["block"]])
        self.optimizer.step()
        self.optimizer.zero_grad()


class TorchRAdam(TorchAdamW):
    """torch.optim.RAdam with a group per block type and decay; the five steps that it takes unrectified have a rate of 0, as
    the official code skips them."""

    # a partial will be a method descriptor some day, as Python 3.13 warns
    kind = staticmethod(functools.partial(torch.optim.RAdam, decoupled_weight_decay=True))
    UNRECTIFIED = 5
    steps = 0

    def step(self, lr_of: Callable[[float], float]) -> None:
        self.steps += 1
        super().step(lr_of if self.steps > self.UNRECTIFIED else lambda ratio: 0.0)


class LoopAdamMini:
    """Adam-mini (arXiv 2406.16793) as a loop over segments, one at a time."""

    def __init__(
        self, twin: Twin, betas: tuple[float, float], eps: float, decay: float, ratios: dict[str, float]
    ) -> None:
        self.twin, self.betas, self.eps, self.decay, self.ratios = twin, betas, eps, decay, ratios
        self.moments: dict[str, tuple[torch.Tensor, list]] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self, lr_of: Callable[[float], float]) -> None:
        self.steps += 1
        for name, leaf in self.twin.leaves.items():
            self._leaf(name, leaf, lr_of(self.ratios[leaf.block]))
            leaf.tensor.grad = None

    def _leaf(self, name: str, leaf: Leaf, lr: float) -> None:
        beta1, beta2 = self.betas
        p, g = leaf.tensor.reshape(-1), leaf.tensor.grad.reshape(-1)
        count = leaf.segments or p.numel()
        if name not in self.moments:
            self.moments[name] = (torch.zeros_like(p), [torch.zeros(()) for _ in range(count)])
        first, second = self.moments[name]
        if leaf.decayed:
            p = p * (1 - lr * self.decay)
        first.copy_(beta1 * first + (1 - beta1) * g)
        rows = []
        for i, (p_i, g_i, m_i) in enumerate(zip(p.chunk(count), g.chunk(count), first.chunk(count))):
            second[i] = beta2 * second[i] + (1 - beta2) * (g_i * g_i).mean()
            m_hat = m_i / (1 - beta1**self.steps)
            v_hat = second[i] / (1 - beta2**self.steps)
            rows.append(p_i - lr * m_hat / (v_hat.sqrt() + self.eps))
        leaf.tensor.copy_(torch.cat(rows).view_as(leaf.tensor))


class PlainLion:
    """Lion (arXiv 2302.06675, algorithm 2) with decoupled decay, leaf by leaf; the sign of 0 is 0.

    The gradient of a bias of k is rounding noise around 0 (softmax does not see it), whose sign differs from run to run, so
    models without such biases are compared.
    """

    def __init__(
        self, twin: Twin, betas: tuple[float, float], eps: float, decay: float, ratios: dict[str, float]
    ) -> None:
        self.twin, self.betas, self.decay, self.ratios = twin, betas, decay, ratios
        self.momentum = {name: torch.zeros_like(leaf.tensor) for name, leaf in twin.leaves.items()}

    @torch.no_grad()
    def step(self, lr_of: Callable[[float], float]) -> None:
        beta1, beta2 = self.betas
        for name, leaf in self.twin.leaves.items():
            p, g, m, lr = leaf.tensor, leaf.tensor.grad, self.momentum[name], lr_of(self.ratios[leaf.block])
            mixed = beta1 * m + (1 - beta1) * g
            moved = (mixed > 0).float() - (mixed < 0).float() + (self.decay * p if leaf.decayed else 0)
            p -= lr * moved
            self.momentum[name] = beta2 * m + (1 - beta2) * g
            p.grad = None


class TorchMuon:
    """torch.optim.Muon on the leaves that are hidden matrices, the plain form of ``of_rest`` on all others."""

    of_rest: Callable[..., Any] = TorchAdamW
    HIDDEN = ("qk", "vo", "ffn")

    def __init__(
        self,
        twin: Twin,
        betas: tuple[float, float],
        eps: float,
        decay: float,
        ratios: dict[str, float],
        scale: str = "match_rms_adamw",
    ) -> None:
        self.ratios = ratios
        hidden = {n for n, leaf in twin.leaves.items() if leaf.block in self.HIDDEN and leaf.tensor.dim() == 2}
        groups = [{"params": [leaf.tensor], "block": leaf.block} for n, leaf in twin.leaves.items() if n in hidden]
        self.muon = torch.optim.Muon(groups, weight_decay=decay, adjust_lr_fn=scale)
        rest = SimpleNamespace(leaves={n: leaf for n, leaf in twin.leaves.items() if n not in hidden})
        self.rest = self.of_rest(rest, betas, eps, decay, ratios)

    def step(self, lr_of: Callable[[float], float]) -> None:
        for group in self.muon.param_groups:
            group["lr"] = lr_of(self.ratios[group["block"]])
        self.muon.step()
        self.muon.zero_grad()
        self.rest.step(lr_of)


class TorchMuonMini(TorchMuon):
    """With Adam-mini's loop for the rest."""

    of_rest = LoopAdamMini


REFERENCES = {
    "BlockwiseAdamW": TorchAdamW,
    "BlockwiseAdamMini": LoopAdamMini,
    "BlockwiseLion": PlainLion,
    "BlockwiseRAdam": TorchRAdam,
    "BlockwiseMuon": TorchMuon,
    "BlockwiseMuonMini": TorchMuonMini,
}


def token_ids(steps: int, accumulation: int, ranks: int, batch: int = 2, length: int = 12) -> torch.Tensor:
    """(steps, accumulation, ranks, batch, length) token ids, the same everywhere."""
    shape = (steps, accumulation, ranks, batch, length)
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))


def worst_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], kind: str | None = None) -> float:
    """The largest relative difference (2-norm) of any tensor.

    Of Lion the hundredth of a tensor's elements that differ most is left out: where gradients are summed in another order,
    a sign around 0 may come out otherwise and moves its element by a whole step. A wrong rate, block or cut moves more.
    """
    assert found.keys() == wanted.keys()
    return max(_difference(found[n].double(), wanted[n].double(), kind == "BlockwiseLion") for n in wanted)


def _difference(found: torch.Tensor, wanted: torch.Tensor, trimmed: bool) -> float:
    apart = (found - wanted).abs().reshape(-1)
    if trimmed:
        apart = apart.sort().values[: apart.numel() - -(-apart.numel() // 100)]
    return float((apart.norm() / wanted.norm()).detach())
