"""Public models of every family with their published configs, at the smallest depth that has every kind of layer.

``blockwise-lr families`` maps each of them on the meta device; the tests compare the counts with formulas of the
configs. A new family is one entry here, one in :mod:`blockwise_lr.blocks.families` if its names are not generic, and
one row in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..blocks import map_blocks
from ..blocks.dims import config_values
from . import remote_code


@dataclass(frozen=True)
class PublicModel:
    """One published model.

    Attributes:
        name: the publisher's name.
        architecture: the class in transformers, or a function of :mod:`.remote_code` for models that are not there.
        config: the values of its config that determine parameters.
    """

    name: str
    architecture: str
    config: dict[str, Any]

    def build(self) -> torch.nn.Module:
        """The model on the meta device: names and shapes without memory."""
        if hasattr(remote_code, self.architecture):
            return getattr(remote_code, self.architecture)(**self.config)
        import transformers

        cls = getattr(transformers, self.architecture)
        with torch.device("meta"):
            return cls(cls.config_class(**self.config, bos_token_id=None, eos_token_id=None, pad_token_id=None))


def _decoder(
    name: str,
    architecture: str,
    hidden: int,
    inner: int,
    heads: int,
    kv: int,
    vocabulary: int,
    layers: int = 2,
    **more: Any,
) -> PublicModel:
    """A model whose config has the common names of values."""
    return PublicModel(
        name,
        architecture,
        dict(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            **more,
        ),
    )


_LATENT = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1)

PUBLIC_MODELS: tuple[PublicModel, ...] = (
    # GPT-2 and its heirs
    PublicModel("gpt2", "GPT2LMHeadModel", dict(n_embd=768, n_layer=2, n_head=12, vocab_size=50257, n_positions=1024)),
    PublicModel("nanoGPT", "nanogpt", dict(n_embd=768, n_layer=2, n_head=12, vocab_size=50304, block_size=1024)),
    PublicModel(
        "gpt-neo-1.3B",
        "GPTNeoForCausalLM",
        dict(
            hidden_size=2048,
            num_layers=2,
            num_heads=16,
            attention_types=[[["global", "local"], 1]],
            vocab_size=50257,
            max_position_embeddings=2048,
        ),
    ),
    PublicModel(
        "gpt-j-6b", "GPTJForCausalLM", dict(n_embd=4096, n_layer=2, n_head=16, rotary_dim=64, vocab_size=50400)
    ),
    PublicModel(
        "starcoderbase",
        "GPTBigCodeForCausalLM",
        dict(n_embd=6144, n_inner=24576, n_layer=2, n_head=48, vocab_size=49152, n_positions=8192),
    ),
    PublicModel(
        "pythia-1b",
        "GPTNeoXForCausalLM",
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=8, vocab_size=50304),
    ),
    PublicModel(
        "gpt-neox-20b",
        "GPTNeoXForCausalLM",
        dict(hidden_size=6144, intermediate_size=24576, num_hidden_layers=2, num_attention_heads=64, vocab_size=50432),
    ),
    PublicModel(
        "opt-350m",
        "OPTForCausalLM",
        dict(
            hidden_size=1024,
            ffn_dim=4096,
            num_hidden_layers=2,
            num_attention_heads=16,
            vocab_size=50272,
            word_embed_proj_dim=512,
            do_layer_norm_before=False,
            max_position_embeddings=2048,
        ),
    ),
    PublicModel("bloom-7b1", "BloomForCausalLM", dict(hidden_size=4096, n_layer=2, n_head=32, vocab_size=250880)),
    PublicModel("mpt-7b", "MptForCausalLM", dict(d_model=4096, n_heads=32, n_layers=2, vocab_size=50432)),
    PublicModel(
        "falcon-rw-1b",
        "FalconForCausalLM",
        dict(
            hidden_size=2048,
            num_hidden_layers=2,
            num_attention_heads=32,
            vocab_size=50304,
            alibi=True,
            bias=True,
            multi_query=False,
            parallel_attn=False,
            new_decoder_architecture=False,
        ),
    ),
    PublicModel(
        "falcon-7b",
        "FalconForCausalLM",
        dict(
            hidden_size=4544,
            num_hidden_layers=2,
            num_attention_heads=71,
            vocab_size=65024,
            alibi=False,
            bias=False,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
        ),
    ),
    PublicModel(
        "falcon-40b",
        "FalconForCausalLM",
        dict(
            hidden_size=8192,
            num_hidden_layers=2,
            num_attention_heads=128,
            num_kv_heads=8,
            vocab_size=65024,
            alibi=False,
            bias=False,
            parallel_attn=True,
            new_decoder_architecture=True,
        ),
    ),
    # LLaMA and models of its shape
    _decoder("llama-7b", "LlamaForCausalLM", 4096, 11008, 32, 32, 32000),
    _decoder("llama-2-70b", "LlamaForCausalLM", 8192, 28672, 64, 8, 32000),
    _decoder("llama-3-8b", "LlamaForCausalLM", 4096, 14336, 32, 8, 128256),
    _decoder("llama-3.2-1b", "LlamaForCausalLM", 2048, 8192, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    _decoder(
        "llama-4-maverick",
        "Llama4ForCausalLM",
        5120,
        8192,
        40,
        8,
        202048,
        head_dim=128,
        intermediate_size_mlp=16384,
        num_local_experts=128,
        interleave_moe_layer_step=2,
    ),
    PublicModel(
        "torchtitan llama3-8b",
        "torchtitan_llama",
        dict(dim=4096, n_layers=2, n_heads=32, n_kv_heads=8, ffn_hidden=14336, vocab_size=128256),
    ),
    _decoder("mistral-7b", "MistralForCausalLM", 4096, 14336, 32, 8, 32000),
    _decoder("mixtral-8x7b", "MixtralForCausalLM", 4096, 14336, 32, 8, 32000, num_local_experts=8),
    _decoder("qwen2-0.5b", "Qwen2ForCausalLM", 896, 4864, 14, 2, 151936, tie_word_embeddings=True),
    _decoder("qwen2.5-7b", "Qwen2ForCausalLM", 3584, 18944, 28, 4, 152064),
    _decoder(
        "qwen1.5-moe-a2.7b",
        "Qwen2MoeForCausalLM",
        2048,
        5632,
        16,
        16,
        151936,
        num_experts=60,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    _decoder("qwen3-0.6b", "Qwen3ForCausalLM", 1024, 3072, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
    _decoder(
        "qwen3-30b-a3b",
        "Qwen3MoeForCausalLM",
        2048,
        6144,
        32,
        4,
        151936,
        head_dim=128,
        num_experts=128,
        moe_intermediate_size=768,
    ),
    _decoder(
        "qwen3-next-80b-a3b",
        "Qwen3NextForCausalLM",
        2048,
        5120,
        16,
        2,
        151936,
        layers=4,
        head_dim=256,
        num_experts=512,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    _decoder("gemma-2b", "GemmaForCausalLM", 2048, 16384, 8, 1, 256000, head_dim=256),
    _decoder("gemma-2-9b", "Gemma2ForCausalLM", 3584, 14336, 16, 8, 256000, head_dim=256),
    _decoder("gemma-3-1b", "Gemma3ForCausalLM", 1152, 6912, 4, 1, 262144, head_dim=256),
    _decoder("phi-2", "PhiForCausalLM", 2560, 10240, 32, 32, 51200),
    _decoder("phi-3-mini", "Phi3ForCausalLM", 3072, 8192, 32, 32, 32064),
    _decoder("phi-3-medium", "Phi3ForCausalLM", 5120, 17920, 40, 10, 32064),
    _decoder("stablelm-2-1.6b", "StableLmForCausalLM", 2048, 5632, 32, 32, 100352, use_qkv_bias=True),
    _decoder("stablelm-2-12b", "StableLmForCausalLM", 5120, 13824, 32, 8, 100352, qk_layernorm=True),
    _decoder("olmo-1b", "OlmoForCausalLM", 2048, 8192, 16, 16, 50304, tie_word_embeddings=True),
    _decoder("olmo-2-7b", "Olmo2ForCausalLM", 4096, 11008, 32, 32, 100352),
    _decoder("olmoe-1b-7b", "OlmoeForCausalLM", 2048, 1024, 16, 16, 50304, num_experts=64),
    _decoder("glm-4-9b", "GlmForCausalLM", 4096, 13696, 32, 2, 151552, head_dim=128, attention_bias=True),
    _decoder("glm-4-0414", "Glm4ForCausalLM", 4096, 13696, 32, 2, 151552, head_dim=128, attention_bias=True),
    PublicModel(
        "glm-4-9b remote code",
        "chatglm",
        dict(
            hidden_size=4096,
            ffn_hidden_size=13696,
            num_layers=2,
            num_attention_heads=32,
            multi_query_group_num=2,
            padded_vocab_size=151552,
        ),
    ),
    _decoder("command-r", "CohereForCausalLM", 8192, 22528, 64, 64, 256000),
    _decoder("command-r-plus", "CohereForCausalLM", 12288, 33792, 96, 8, 256000, use_qk_norm=True),
    PublicModel(
        "internlm-7b",
        "internlm",
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=103168),
    ),
    PublicModel(
        "internlm2-7b",
        "internlm2",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=92544,
        ),
    ),
    PublicModel(
        "baichuan2-7b",
        "baichuan",
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=125696),
    ),
    _decoder("starcoder2-3b", "Starcoder2ForCausalLM", 3072, 12288, 24, 2, 49152),
    _decoder("granite-3.1-8b", "GraniteForCausalLM", 4096, 12800, 32, 8, 49155, tie_word_embeddings=True),
    _decoder(
        "granite-3.1-1b-a400m",
        "GraniteMoeForCausalLM",
        1024,
        512,
        16,
        8,
        49155,
        num_local_experts=32,
        tie_word_embeddings=True,
    ),
    _decoder("gpt-oss-20b", "GptOssForCausalLM", 2880, 2880, 64, 8, 201088, head_dim=64, num_local_experts=32),
    # latent attention
    _decoder(
        "deepseek-v2-lite",
        "DeepseekV2ForCausalLM",
        2048,
        10944,
        16,
        16,
        102400,
        q_lora_rank=None,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        **_LATENT,
    ),
    _decoder(
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        5120,
        12288,
        128,
        128,
        102400,
        q_lora_rank=1536,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        n_shared_experts=2,
        **_LATENT,
    ),
    _decoder(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        7168,
        18432,
        128,
        128,
        129280,
        q_lora_rank=1536,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        **_LATENT,
    ),
    # state-space models
    PublicModel(
        "mamba-130m", "MambaForCausalLM", dict(hidden_size=768, num_hidden_layers=2, state_size=16, vocab_size=50280)
    ),
    PublicModel(
        "mamba2-2.7b",
        "Mamba2ForCausalLM",
        dict(
            hidden_size=2560,
            num_hidden_layers=2,
            state_size=128,
            num_heads=80,
            head_dim=64,
            n_groups=1,
            vocab_size=50288,
            tie_word_embeddings=True,
        ),
    ),
    _decoder(
        "jamba-v0.1",
        "JambaForCausalLM",
        4096,
        14336,
        32,
        8,
        65536,
        layers=4,
        num_experts=16,
        attn_layer_period=4,
        attn_layer_offset=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=256,
        mamba_d_state=16,
    ),
    # encoders
    PublicModel(
        "bert-base",
        "BertForMaskedLM",
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, vocab_size=30522),
    ),
    PublicModel(
        "roberta-base",
        "RobertaForMaskedLM",
        dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=2,
            num_attention_heads=12,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
        ),
    ),
    PublicModel(
        "t5-small",
        "T5ForConditionalGeneration",
        dict(d_model=512, d_kv=64, d_ff=2048, num_layers=2, num_heads=8, vocab_size=32128),
    ),
    PublicModel(
        "flan-t5-base",
        "T5ForConditionalGeneration",
        dict(
            d_model=768,
            d_kv=64,
            d_ff=2048,
            num_layers=2,
            num_heads=12,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
    ),
    PublicModel(
        "vit-base-patch16-224",
        "ViTForImageClassification",
        dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=2,
            num_attention_heads=12,
            image_size=224,
            patch_size=16,
            num_labels=1000,
        ),
    ),
)


@dataclass(frozen=True)
class Survey:
    """Counts of a mapped model: parameters (tied ones once), spans of one role in them, parameters without a rule."""

    model: str
    family: str
    mapped: int
    spans: int
    unmapped: int
    block_numel: dict[str, int]


def survey(model: PublicModel) -> Survey:
    """Maps a public model and counts its parameters.

    Raises:
        BlockError: a layout does not fit the config.
    """
    built = model.build()
    family = config_values(built.config).get("model_type", model.architecture)
    block_map = map_blocks(built, strict=False)
    return Survey(
        model.name,
        family,
        len(block_map) - len(block_map.unmapped),
        sum(len(layout.spans()) for layout in block_map.values()),
        len(block_map.unmapped),
        {block.value: numel for block, numel in block_map.block_numel().items()},
    )
