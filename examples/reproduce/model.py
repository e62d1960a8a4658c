"""The ladder's models: randomly initialized LLaMA models of transformers, from 0.3M to 10M matrix parameters."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 1024
LENGTH = 128  # tokens of a sequence

# width, layers, heads, width of the FFN (8/3 of the width, to a multiple of 8)
RUNGS = {
    "tiny": (16, 1, 2, 40),  # for the tests
    "0.3M": (80, 4, 4, 216),
    "1M": (128, 5, 4, 344),
    "3M": (192, 7, 6, 512),
    "10M": (320, 8, 8, 864),
}


def body_parameters(rung: str) -> int:
    """Weights of the attention and FFN matrices, which give a rung its name and are the parameters of "tokens per
    parameter"; neither the input embedding nor the head (vocabulary x width each), nor the norms."""
    width, layers, _, ffn = RUNGS[rung]
    return layers * (4 * width * width + 3 * width * ffn)


def build_model(rung: str, seed: int, embedding_std: float = 0.02) -> LlamaForCausalLM:
    """A fresh model of a rung: RMSNorm, rotary positions, SwiGLU, untied head, all matrices from N(0, 0.02^2) but the
    input embedding, if another standard deviation is given."""
    width, layers, heads, ffn = RUNGS[rung]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=ffn,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(embedding_std / 0.02)
    return model
