"""The ladder's models: randomly initialized LLaMA models of transformers, from 0.3M to 30M matrix parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Rung:
    """Sizes of a model, and what it reads.

    Attributes:
        ffn: width of the FFN: 8/3 of the width, to a multiple of 8 (30M: of 32).
        length: tokens of a sequence.
        corpus: one of data.CORPORA.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int = 1024
    length: int = 128
    corpus: str = "mixed"


RUNGS = {
    "tiny": Rung(16, 1, 2, 40),  # for the tests
    "0.3M": Rung(80, 4, 4, 216),
    "1M": Rung(128, 5, 4, 344),
    "3M": Rung(192, 7, 6, 512),
    "10M": Rung(320, 8, 8, 864),
    "30M": Rung(512, 10, 8, 1376, vocabulary=8192, length=512, corpus="packages"),  # for a GPU
}


def body_parameters(rung: str) -> int:
    """Weights of the attention and FFN matrices, which give a rung its name and are the parameters of "tokens per
    parameter"; neither the input embedding nor the head (vocabulary x width each), nor the norms."""
    of = RUNGS[rung]
    return of.layers * (4 * of.width * of.width + 3 * of.width * of.ffn)


def build_model(rung: str, seed: int, embedding_std: float = 0.02) -> LlamaForCausalLM:
    """A fresh model of a rung: RMSNorm, rotary positions, SwiGLU, untied head, all matrices from N(0, 0.02^2) but the
    input embedding, if another standard deviation is given."""
    of = RUNGS[rung]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=of.vocabulary,
            hidden_size=of.width,
            num_hidden_layers=of.layers,
            num_attention_heads=of.heads,
            num_key_value_heads=of.heads,
            intermediate_size=of.ffn,
            max_position_embeddings=of.length,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(embedding_std / 0.02)
    return model
