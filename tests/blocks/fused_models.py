"""Tiny real models with fused attention weights, and twins of those whose code is not in transformers.

The twins name their parameters and split their fused weight as the published code does; the rest is plain attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Fused:
    """A model and where its first attention layer keeps things.

    Attributes:
        build: makes the model.
        fused: the module with the fused weight.
        output: the attention's output projection, whose input is the mixed values.
        roles: what the fused weight holds.
    """

    build: Callable[[], nn.Module]
    fused: str
    output: str
    roles: tuple[str, ...] = ("q", "k", "v")


def _real(architecture: str, **config) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        cls = getattr(transformers, architecture)
        return cls(cls.config_class(vocab_size=50, bos_token_id=None, eos_token_id=None, pad_token_id=None, **config))

    return build


class TwinAttention(nn.Module):
    """Causal attention without positions over a fused weight called ``fused``, split by ``split`` into (batch, length,
    heads, head_dim) tensors."""

    def __init__(self, fused: str, output: str, rows: int, split: Callable) -> None:
        super().__init__()
        self.names, self.split = (fused, output), split
        self.add_module(fused, nn.Linear(32, rows, bias=False))
        self.add_module(output, nn.Linear(32, 32, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused, output = (getattr(self, name) for name in self.names)
        q, k, v = (part.transpose(1, 2) for part in self.split(fused(x)))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return output(mixed.transpose(1, 2).flatten(2))


class Twin(nn.Module):
    """An embedding and one attention layer under the published names."""

    def __init__(self, config: dict, embedding: str, attention: str, layer: TwinAttention) -> None:
        super().__init__()
        self.config, self.order = config, (embedding, attention)
        for name, part in ((embedding, nn.Embedding(50, 32)), (attention, layer)):
            module = self
            *path, leaf = name.split(".")
            for step in path:
                if step not in module._modules:
                    module.add_module(step, nn.Module())
                module = module._modules[step]
            module.add_module(leaf, part)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedding, attention = (self.get_submodule(name) for name in self.order)
        return attention(embedding(ids))


def _nanogpt() -> nn.Module:
    def split(x):  # c_attn(x).split(n_embd, dim=2)
        return (part.unflatten(-1, (4, 8)) for part in x.split(32, dim=2))

    return Twin({"n_head": 4}, "transformer.wte", "transformer.h.0.attn", TwinAttention("c_attn", "c_proj", 96, split))


def _baichuan() -> nn.Module:
    def split(x):  # W_pack(x).unflatten(-1, (3, hidden))
        return (part.unflatten(-1, (4, 8)) for part in x.unflatten(-1, (3, 32)).unbind(-2))

    return Twin(
        {"model_type": "baichuan", "num_attention_heads": 4},
        "model.embed_tokens",
        "model.layers.0.self_attn",
        TwinAttention("W_pack", "o_proj", 96, split),
    )


def _internlm2() -> nn.Module:
    def split(x):  # "b q (h gs d) -> b q h gs d" with gs = query heads per key head, k, v
        grouped = x.unflatten(-1, (2, 4, 8))
        return grouped[..., :2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]

    return Twin(
        {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2},
        "model.tok_embeddings",
        "model.layers.0.attention",
        TwinAttention("wqkv", "wo", 64, split),
    )


def _chatglm() -> nn.Module:
    def split(x):  # split into all q, then the k of the groups, then their v
        return (part.unflatten(-1, (-1, 8)) for part in x.split((32, 16, 16), dim=-1))

    return Twin(
        {"model_type": "chatglm", "num_attention_heads": 4, "multi_query_group_num": 2},
        "transformer.embedding.word_embeddings",
        "transformer.encoder.layers.0.self_attention",
        TwinAttention("query_key_value", "dense", 64, split),
    )


_HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_FALCON = "transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"
_GPT = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"

FUSED_MODELS = {
    "gpt2": Fused(_real("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4), *_GPT),
    "starcoder multi-query": Fused(_real("GPTBigCodeForCausalLM", n_embd=32, n_layer=2, n_head=4), *_GPT),
    "starcoder multi-head": Fused(
        _real("GPTBigCodeForCausalLM", n_embd=32, n_layer=2, n_head=4, multi_query=False), *_GPT
    ),
    "gpt-neox": Fused(
        _real("GPTNeoXForCausalLM", intermediate_size=44, **_HF),
        "gpt_neox.layers.0.attention.query_key_value",
        "gpt_neox.layers.0.attention.dense",
    ),
    "bloom": Fused(_real("BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4), *_FALCON),
    "mpt": Fused(
        _real("MptForCausalLM", d_model=32, n_layers=2, n_heads=4),
        "transformer.blocks.0.attn.Wqkv",
        "transformer.blocks.0.attn.out_proj",
    ),
    "falcon-rw": Fused(
        _real(
            "FalconForCausalLM",
            alibi=True,
            bias=True,
            multi_query=False,
            parallel_attn=False,
            new_decoder_architecture=False,
            **_HF,
        ),
        *_FALCON,
    ),
    "falcon-7b": Fused(_real("FalconForCausalLM", multi_query=True, new_decoder_architecture=False, **_HF), *_FALCON),
    "falcon-40b": Fused(_real("FalconForCausalLM", num_kv_heads=2, new_decoder_architecture=True, **_HF), *_FALCON),
    "phi-3": Fused(
        _real("Phi3ForCausalLM", intermediate_size=44, num_key_value_heads=2, **_HF),
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
    ),
    "deepseek-v3": Fused(
        _real(
            "DeepseekV3ForCausalLM",
            intermediate_size=44,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=12,
            n_routed_experts=4,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
            **_HF,
        ),
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.0.self_attn.o_proj",
        ("k", "v"),
    ),
    "qwen3-next": Fused(
        _real(
            "Qwen3NextForCausalLM",
            intermediate_size=44,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["full_attention", "full_attention"],
            **_HF,
        ),
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        ("q", "gate"),
    ),
    "nanoGPT": Fused(_nanogpt, *_GPT),
    "baichuan": Fused(_baichuan, "model.layers.0.self_attn.W_pack", "model.layers.0.self_attn.o_proj"),
    "internlm2": Fused(_internlm2, "model.layers.0.attention.wqkv", "model.layers.0.attention.wo"),
    "chatglm": Fused(
        _chatglm,
        "transformer.encoder.layers.0.self_attention.query_key_value",
        "transformer.encoder.layers.0.self_attention.dense",
    ),
}
