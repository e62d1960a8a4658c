"""Every model of the installed transformers by category, built on the meta device, and numbers derived from its config.

Nothing here knows blockwise_lr.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

CATEGORIES = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "multimodal-lm": "MULTIMODAL_LM",
    "speech-seq2seq": "SPEECH_SEQ_2_SEQ",
    "ctc": "CTC",
    "pretraining": "PRETRAINING",
}


def members(category: str) -> list[str]:
    """The class names of a category."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{CATEGORIES[category]}_MAPPING_NAMES", {})
    values = [v for value in mapping.values() for v in (value if isinstance(value, (list, tuple)) else (value,))]
    return list(dict.fromkeys(values))


def classes(category: str) -> list[str]:
    """The class names of a category, each in the first category that has it."""
    seen: set[str] = set()
    for name in CATEGORIES:
        found = [v for v in members(name) if v not in seen]
        if name == category:
            return found
        seen.update(found)
    raise KeyError(category)


def _pair(composite: str, encoder: str) -> Callable[[], Any]:
    def config() -> Any:
        make = getattr(transformers, f"{composite}Config").from_encoder_decoder_configs
        return make(getattr(transformers, f"{encoder}Config")(), transformers.BertConfig())

    return config


# Classes whose default config builds no model, with one that does.
CONFIGS: dict[str, dict[str, Any]] = {
    "HunYuanDenseV1ForCausalLM": dict(head_dim=128),
    "HunYuanMoEV1ForCausalLM": dict(head_dim=128),
    "MinistralForCausalLM": dict(head_dim=128),
    "NemotronForCausalLM": dict(num_key_value_heads=8),
    "ReformerModelWithLMHead": dict(is_decoder=True),
    "Lfm2MoeForCausalLM": dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "EsmForMaskedLM": dict(vocab_size=33),
    "Wav2Vec2BertForCTC": dict(vocab_size=32),
    "Wav2Vec2ConformerForCTC": dict(vocab_size=32),
}
COMPOSITES = {
    "EncoderDecoderModel": _pair("EncoderDecoder", "Bert"),
    "VisionEncoderDecoderModel": _pair("VisionEncoderDecoder", "ViT"),
    "SpeechEncoderDecoderModel": _pair("SpeechEncoderDecoder", "Wav2Vec2"),
}


def build(name: str) -> nn.Module | None:
    """A class's model on the meta device from its default config; None if that config builds none here."""
    cls = getattr(transformers, name)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            config = COMPOSITES[name]() if name in COMPOSITES else cls.config_class(**CONFIGS.get(name, {}))
            return cls(config).eval()
        except Exception:  # a default config that lacks a value, or a library that is not installed
            return None


def dense_decoder(config: Any) -> dict[str, int] | None:
    """Elements of the matrices in attention and feed-forward networks of a decoder of equal layers; None: it is no such.

    Returns:
        ``qk``, ``vo``, ``ffn`` (of two matrices a layer; a gated one has half as much again).
    """
    if _is_mixed(config.to_dict()):
        return None
    layers, width, heads = (
        getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    if not all(isinstance(n, int) for n in (layers, width, heads, inner)):
        return None
    kv = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or width // heads
    q, k = layers * width * heads * size, layers * width * kv * size
    return {"qk": q + k, "vo": q + k, "ffn": 2 * layers * width * inner}


# what makes layers unequal, shares or adds weights; a config that states any of it (not 0, not None) has no such formula
_MIXED = (
    "expert", "mamba", "linear", "lora", "conv", "recurrent", "ssm", "global_head", "encoder", "vision", "audio", "loop",
    "altup", "per_layer", "cross", "ngram", "compress", "index_", "word_embed_proj", "embedding_size", "adapter", "block_types",
    "shared_layer",
    "cycles", "layer_group",
)  # fmt: skip


def _is_mixed(values: dict[str, Any]) -> bool:
    return any(
        value not in (None, 0, False, [], {}) and any(part in key for part in _MIXED)
        for key, value in values.items()
        if key not in ("is_encoder_decoder",)
    )
