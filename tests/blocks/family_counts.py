"""What every public model must be mapped to, counted from its config by hand.

A count is (elements per block type, parameters, spans).

Nothing here knows blockwise_lr. ``H`` is the width, ``V`` the vocabulary, ``L`` the layers of the cut model.
"""

from __future__ import annotations

from typing import Any

Counts = tuple[dict[str, int], int, int]


def gqa(c: dict[str, Any], qkv_bias: bool = False, o_bias: bool = False) -> tuple[int, int]:
    """(qk, vo) elements of one attention layer with separate or fused projections."""
    H, heads, kv = c["hidden_size"], c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    d = c.get("head_dim") or H // heads
    q, k = heads * d, kv * d
    return (H + qkv_bias) * (q + k), (H + qkv_bias) * k + q * H + o_bias * H


def decoder(
    c: dict[str, Any],
    ffn: int,
    norms: int,
    parameters: int,
    *,
    final_norm: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    tied: bool | None = None,
    head_bias: bool = False,
    router: int = 0,
    spans: int = 0,
    final_parameters: int = 1,
) -> Counts:
    """A decoder of L equal layers.

    Args:
        ffn, norms, router: elements per layer.
        parameters: tensors per layer.
        final_norm: elements of the last norm; the width by default.
        spans: spans per layer beyond one per tensor.
        final_parameters: tensors of the last norm.
    """
    H, V, L = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    tied = c.get("tie_word_embeddings", False) if tied is None else tied
    qk, vo = gqa(c, qkv_bias, o_bias)
    found = {
        "embedding": V * H,
        "head": 0 if tied else V * H + head_bias * V,
        "qk": L * qk,
        "vo": L * vo,
        "ffn": L * ffn,
        "norm": L * norms + (H if final_norm is None else final_norm),
        "router": L * router,
    }
    tensors = L * parameters + final_parameters + (1 if tied else 2 + head_bias)
    return {k: n for k, n in found.items() if n}, tensors, tensors + L * spans


def glu(c: dict[str, Any]) -> int:
    return 3 * c["hidden_size"] * c["intermediate_size"]


def llama(c: dict[str, Any], norms: int = 2, extra: int = 0, **more: Any) -> Counts:
    """q, k, v, o, gate, up, down and norms of the width; ``extra`` elements in two q and k norms."""
    tensors = 7 + norms + (2 if extra else 0) + (3 if more.get("qkv_bias") else 0)
    return decoder(c, glu(c), norms * c["hidden_size"] + extra, tensors, **more)


def experts(
    c: dict[str, Any], count: int, inner: int, norms: int, parameters: int, shared: int = 0, gates: int = 0, **more: Any
) -> Counts:
    """Stacked experts behind a router; ``shared`` inner size of an expert for all; ``gates`` rows beside the router."""
    H = c["hidden_size"]
    return decoder(c, 3 * H * (count * inner + shared), norms, parameters, router=(count + gates) * H, **more)


def gpt2(c: dict[str, Any], bias: bool, positions: int, kv: int | None = None) -> Counts:
    """Fused [q, k, v]: three spans for the weight and the bias. ``kv``: key heads where they are fewer."""
    H, V, L = c["n_embd"], c["vocab_size"], c["n_layer"]
    inner = c.get("n_inner", 4 * H)
    k = H if kv is None else H // c["n_head"] * kv
    tensors = L * (12 if bias else 6) + (4 if bias else 3)
    found = {
        "embedding": (V + positions) * H,
        "qk": L * (H + bias) * (H + k),
        "vo": L * ((H + bias) * k + H * H + bias * H),
        "ffn": L * (2 * H * inner + bias * (inner + H)),
        "norm": (2 * L + 1) * (1 + bias) * H,
    }
    return found, tensors, tensors + L * 2 * (2 if bias else 1)


def per_head(
    H: int, inner: int, heads: int, V: int, L: int, *, norm_pairs: int, extra_pairs: int, tied: bool
) -> Counts:
    """GPT-NeoX and its kin: biases everywhere, q, k, v once per head, norms with weight and bias."""
    tensors = L * (8 + 2 * norm_pairs) + 2 * extra_pairs + (1 if tied else 2)
    found = {
        "embedding": V * H,
        "head": 0 if tied else V * H,
        "qk": L * 2 * (H * H + H),
        "vo": L * 2 * (H * H + H),
        "ffn": L * (2 * H * inner + inner + H),
        "norm": (L * norm_pairs + extra_pairs) * 2 * H,
    }
    return {k: n for k, n in found.items() if n}, tensors, tensors + L * 2 * (3 * heads - 1)


def mpt(c: dict[str, Any]) -> Counts:
    H, L = c["d_model"], c["n_layers"]
    return (
        {
            "embedding": c["vocab_size"] * H,
            "qk": 2 * L * H * H,
            "vo": 2 * L * H * H,
            "ffn": 8 * L * H * H,
            "norm": (2 * L + 1) * H,
        },
        6 * L + 2,
        6 * L + 2 + 2 * L,
    )


def falcon(c: dict[str, Any], kv: int, norm_pairs: int, spans: int) -> Counts:
    like = dict(c, num_key_value_heads=kv)
    H = c["hidden_size"]
    return decoder(
        like,
        8 * H * H,
        2 * norm_pairs * H,
        4 + 2 * norm_pairs,
        final_norm=2 * H,
        final_parameters=2,
        tied=True,
        spans=spans,
    )


def opt_post_norm(c: dict[str, Any]) -> Counts:
    """opt-350m: a factored embedding, norms after the blocks and none at the end, 2 extra rows of positions."""
    H, W, L, F = c["hidden_size"], c["word_embed_proj_dim"], c["num_hidden_layers"], c["ffn_dim"]
    found = {
        "embedding": c["vocab_size"] * W + (c["max_position_embeddings"] + 2) * H + W * H,
        "head": H * W,
        "qk": L * 2 * (H * H + H),
        "vo": L * 2 * (H * H + H),
        "ffn": L * (2 * H * F + F + H),
        "norm": 4 * L * H,
    }
    return found, 16 * L + 4, 16 * L + 4


def llama4(c: dict[str, Any]) -> Counts:
    """One dense layer and one of stacked experts with a shared one."""
    H, E, I = c["hidden_size"], c["num_local_experts"], c["intermediate_size"]
    found, _, _ = decoder(c, 0, 2 * H, 0)
    found["ffn"] = 3 * H * c["intermediate_size_mlp"] + 3 * H * I * (E + 1)
    found["router"] = E * H
    tensors = 3 + 2 * 6 + 3 + 6
    return found, tensors, tensors


def qwen3_next(c: dict[str, Any]) -> Counts:
    """Three layers of linear attention, one of attention whose q has a gate of its size (vo)."""
    H, V, E, I = c["hidden_size"], c["vocab_size"], c["num_experts"], c["moe_intermediate_size"]
    q, k = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    nk, nv = c["linear_num_key_heads"], c["linear_num_value_heads"]
    key, value = nk * c["linear_key_head_dim"], nv * c["linear_value_head_dim"]
    linear = H * (2 * key + 2 * value) + H * 2 * nv + 4 * (2 * key + value) + 2 * nv + value * H
    found = {
        "embedding": V * H,
        "head": V * H,
        "qk": H * (q + k),
        "vo": H * (q + k) + q * H,
        "ssm": 3 * linear,
        "ffn": 4 * 3 * H * (E * I + c["shared_expert_intermediate_size"]),
        "router": 4 * (E + 1) * H,
        "norm": 4 * 2 * H + H + 3 * c["linear_value_head_dim"] + 2 * c["head_dim"],
    }
    tensors = 3 + 3 * 7 + 6 + 4 * 9
    return found, tensors, tensors + 2 * c["num_attention_heads"] - 1


def latent(c: dict[str, Any]) -> Counts:
    """DeepSeek: k and v from one latent (vo); the first layer is dense, the second has experts."""
    H, V, L, heads = c["hidden_size"], c["vocab_size"], 2, c["num_attention_heads"]
    q, r = c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    query = heads * (nope + rope)
    qk = (H * query if q is None else H * q + q * query) + H * rope + heads * nope * r
    E, I = c["n_routed_experts"], c["moe_intermediate_size"]
    found = {
        "embedding": V * H,
        "head": V * H,
        "qk": L * qk,
        "vo": L * (H * r + heads * v * r + heads * v * H),
        "ffn": 3 * H * c["intermediate_size"] + 3 * H * I * (E + c["n_shared_experts"]),
        "router": E * H,
        "norm": L * (2 * H + r + (q or 0)) + H,
    }
    tensors = 3 + L * (7 if q is None else 9) + 3 + 6
    return found, tensors, tensors + L * (1 + 2 * heads - 1)


def mamba_mixer(inner: int, state: int, rank: int, H: int) -> int:
    """in_proj, conv1d of 4 taps and its bias, x_proj, dt_proj, A_log, D, out_proj."""
    return H * 2 * inner + 5 * inner + inner * (rank + 2 * state) + (rank + 1) * inner + inner * (state + 1) + inner * H


def mamba(c: dict[str, Any]) -> Counts:
    H, L = c["hidden_size"], c["num_hidden_layers"]
    return (
        {
            "embedding": c["vocab_size"] * H,
            "ssm": L * mamba_mixer(2 * H, c["state_size"], -(-H // 16), H),
            "norm": (L + 1) * H,
        },
        10 * L + 2,
        10 * L + 2,
    )


def mamba2(c: dict[str, Any]) -> Counts:
    H, L, N = c["hidden_size"], c["num_hidden_layers"], c["num_heads"]
    inner, conv = N * c["head_dim"], N * c["head_dim"] + 2 * c["n_groups"] * c["state_size"]
    mixer = H * (inner + conv + N) + 5 * conv + 3 * N + inner * H
    return {"embedding": c["vocab_size"] * H, "ssm": L * mixer, "norm": L * (H + inner) + H}, 9 * L + 2, 9 * L + 2


def jamba(c: dict[str, Any]) -> Counts:
    """Four layers: the third is attention, the others Mamba; the second and fourth have experts."""
    H, V, E, R, N = c["hidden_size"], c["vocab_size"], c["num_experts"], c["mamba_dt_rank"], c["mamba_d_state"]
    qk, vo = gqa(c)
    found = {
        "embedding": V * H,
        "head": V * H,
        "qk": qk,
        "vo": vo,
        "ssm": 3 * mamba_mixer(2 * H, N, R, H),
        "ffn": 2 * glu(c) * (1 + E),
        "router": 2 * E * H,
        "norm": 4 * 2 * H + H + 3 * (R + 2 * N),
    }
    tensors = 3 + 3 * 12 + 4 + 4 * 2 + 2 * 3 + 2 * 3
    return found, tensors, tensors


def bert(c: dict[str, Any], positions: int, types: int) -> Counts:
    H, V, L, F = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"], c["intermediate_size"]
    tensors = 16 * L + 5 + 5
    return (
        {
            "embedding": (V + positions + types) * H,
            "head": H * H + H + V,
            "qk": L * 2 * (H * H + H),
            "vo": L * 2 * (H * H + H),
            "ffn": L * (2 * H * F + F + H),
            "norm": 4 * L * H + 4 * H,
        },
        tensors,
        tensors,
    )


def vit(c: dict[str, Any]) -> Counts:
    H, L, F, P = c["hidden_size"], c["num_hidden_layers"], c["intermediate_size"], c["patch_size"]
    patches = (c["image_size"] // P) ** 2
    tensors = 16 * L + 4 + 2 + 2
    return (
        {
            "embedding": (1 + patches + 1) * H + 3 * P * P * H + H,
            "head": c["num_labels"] * (H + 1),
            "qk": L * 2 * (H * H + H),
            "vo": L * 2 * (H * H + H),
            "ffn": L * (2 * H * F + F + H),
            "norm": 4 * L * H + 2 * H,
        },
        tensors,
        tensors,
    )


def t5(c: dict[str, Any], wi: int) -> Counts:
    """L encoder layers (self) and L decoder layers (self and cross), 32 buckets of relative positions in each stack;
    transformers 5 ties the embeddings of every T5, whatever its config says."""
    H, A, L, F = c["d_model"], c["num_heads"] * c["d_kv"], c["num_layers"], c["d_ff"]
    tensors = L * (4 + 1 + wi + 2) + L * (8 + 1 + wi + 3) + 2 + 2 + 1
    found = {
        "embedding": c["vocab_size"] * H,
        "qk": 3 * L * 2 * H * A + 2 * 32 * c["num_heads"],
        "vo": 3 * L * 2 * H * A,
        "ffn": 2 * L * (wi + 1) * H * F,
        "norm": 5 * L * H + 2 * H,
    }
    return found, tensors, tensors


def gpt_j(c: dict[str, Any]) -> Counts:
    like = dict(
        hidden_size=c["n_embd"],
        vocab_size=c["vocab_size"],
        num_hidden_layers=c["n_layer"],
        num_attention_heads=c["n_head"],
    )
    H = c["n_embd"]
    return decoder(like, 8 * H * H + 5 * H, 2 * H, 10, final_norm=2 * H, final_parameters=2, head_bias=True)


def gpt_neo(c: dict[str, Any]) -> Counts:
    H = c["hidden_size"]
    like = dict(c, num_hidden_layers=c["num_layers"], num_attention_heads=c["num_heads"])
    found, tensors, _ = decoder(
        like, 8 * H * H + 5 * H, 4 * H, 13, o_bias=True, final_norm=2 * H, final_parameters=2, tied=True
    )
    found["embedding"] += c["max_position_embeddings"] * H
    return found, tensors + 1, tensors + 1


def torchtitan(c: dict[str, Any]) -> Counts:
    return llama(
        dict(
            hidden_size=c["dim"],
            num_hidden_layers=c["n_layers"],
            num_attention_heads=c["n_heads"],
            num_key_value_heads=c["n_kv_heads"],
            intermediate_size=c["ffn_hidden"],
            vocab_size=c["vocab_size"],
        )
    )


def chatglm(c: dict[str, Any]) -> Counts:
    like = dict(
        hidden_size=c["hidden_size"],
        num_hidden_layers=c["num_layers"],
        vocab_size=c["padded_vocab_size"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["multi_query_group_num"],
    )
    H = c["hidden_size"]
    return decoder(like, 3 * H * c["ffn_hidden_size"], 2 * H, 7, qkv_bias=True, spans=4)


def plain_mlp(c: dict[str, Any]) -> int:
    """Two matrices with biases."""
    return 2 * c["hidden_size"] * c["intermediate_size"] + c["intermediate_size"] + c["hidden_size"]


def stablelm(c: dict[str, Any]) -> Counts:
    """Norms with biases; the 12b has a norm per query and key head."""
    H, d = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    per_head_norms = c["num_attention_heads"] + c["num_key_value_heads"] if c.get("qk_layernorm") else 0
    bias = c.get("use_qkv_bias", False)
    return decoder(
        c,
        glu(c),
        4 * H + per_head_norms * d,
        11 + per_head_norms + 3 * bias,
        qkv_bias=bias,
        final_norm=2 * H,
        final_parameters=2,
    )


def gpt_oss(c: dict[str, Any]) -> Counts:
    """Biases everywhere, a sink per head (qk), a router with a bias."""
    H, E, I, L = c["hidden_size"], c["num_local_experts"], c["intermediate_size"], c["num_hidden_layers"]
    found, tensors, _ = decoder(c, E * (3 * H * I + 2 * I + H), 2 * H, 17, qkv_bias=True, o_bias=True, router=E * H + E)
    found["qk"] += L * c["num_attention_heads"]
    return found, tensors, tensors


EXPECTED = {
    "gpt2": lambda c: gpt2(c, True, 1024),
    "nanoGPT": lambda c: gpt2(c, False, 1024),
    "gpt-neo-1.3B": gpt_neo,
    "gpt-j-6b": gpt_j,
    "starcoderbase": lambda c: gpt2(c, True, 8192, kv=1),
    "pythia-1b": lambda c: per_head(2048, 8192, 8, 50304, 2, norm_pairs=2, extra_pairs=1, tied=False),
    "gpt-neox-20b": lambda c: per_head(6144, 24576, 64, 50432, 2, norm_pairs=2, extra_pairs=1, tied=False),
    "opt-350m": opt_post_norm,
    "bloom-7b1": lambda c: per_head(4096, 16384, 32, 250880, 2, norm_pairs=2, extra_pairs=2, tied=True),
    "mpt-7b": mpt,
    "falcon-rw-1b": lambda c: per_head(2048, 8192, 32, 50304, 2, norm_pairs=2, extra_pairs=1, tied=True),
    "falcon-7b": lambda c: falcon(c, kv=1, norm_pairs=1, spans=2),
    "falcon-40b": lambda c: falcon(c, kv=8, norm_pairs=2, spans=3 * 8 - 1),
    "llama-7b": llama,
    "llama-2-70b": llama,
    "llama-3-8b": llama,
    "llama-3.2-1b": llama,
    "mistral-7b": llama,
    "llama-4-maverick": llama4,
    "torchtitan llama3-8b": torchtitan,
    "mixtral-8x7b": lambda c: experts(c, 8, 14336, 2 * 4096, 9),
    "qwen2-0.5b": lambda c: llama(c, qkv_bias=True),
    "qwen2.5-7b": lambda c: llama(c, qkv_bias=True),
    "qwen1.5-moe-a2.7b": lambda c: experts(c, 60, 1408, 2 * 2048, 16, shared=5632, gates=1, qkv_bias=True),
    "qwen3-0.6b": lambda c: llama(c, extra=2 * 128),
    "qwen3-30b-a3b": lambda c: experts(c, 128, 768, 2 * 2048 + 2 * 128, 11),
    "qwen3-next-80b-a3b": qwen3_next,
    "gemma-2b": lambda c: llama(c, tied=True),
    "gemma-2-9b": lambda c: llama(c, norms=4, tied=True),
    "gemma-3-1b": lambda c: llama(c, norms=4, extra=2 * 256, tied=True),
    "phi-2": lambda c: decoder(
        c,
        plain_mlp(c),
        2 * 2560,
        14,
        qkv_bias=True,
        o_bias=True,
        final_norm=2 * 2560,
        final_parameters=2,
        head_bias=True,
    ),
    "phi-3-mini": lambda c: decoder(c, glu(c), 2 * 3072, 6, spans=2),
    "phi-3-medium": lambda c: decoder(c, glu(c), 2 * 5120, 6, spans=2),
    "stablelm-2-1.6b": stablelm,
    "stablelm-2-12b": stablelm,
    "olmo-1b": lambda c: decoder(c, glu(c), 0, 7, final_norm=0, final_parameters=0),
    "olmo-2-7b": lambda c: llama(c, extra=2 * 4096),
    "olmoe-1b-7b": lambda c: experts(c, 64, 1024, 2 * 2048 + 2 * 2048, 11),
    "glm-4-9b": lambda c: decoder(c, glu(c), 2 * 4096, 11, qkv_bias=True),
    "glm-4-0414": lambda c: decoder(c, glu(c), 4 * 4096, 13, qkv_bias=True),
    "glm-4-9b remote code": chatglm,
    "command-r": lambda c: llama(c, norms=1, tied=True),
    "command-r-plus": lambda c: llama(c, norms=1, extra=(96 + 8) * 128, tied=True),
    "internlm-7b": lambda c: decoder(c, glu(c), 2 * 4096, 13, qkv_bias=True, o_bias=True),
    "internlm2-7b": lambda c: decoder(c, glu(c), 2 * 4096, 7, spans=3 * 8 - 1),
    "baichuan2-7b": lambda c: decoder(c, glu(c), 2 * 4096, 7, spans=2),
    "starcoder2-3b": lambda c: decoder(
        c, plain_mlp(c), 4 * 3072, 16, qkv_bias=True, o_bias=True, final_norm=2 * 3072, final_parameters=2, tied=True
    ),
    "granite-3.1-8b": llama,
    "granite-3.1-1b-a400m": lambda c: experts(c, 32, 512, 2 * 1024, 9),
    "gpt-oss-20b": gpt_oss,
    "deepseek-v2-lite": latent,
    "deepseek-v2": latent,
    "deepseek-v3": latent,
    "mamba-130m": mamba,
    "mamba2-2.7b": mamba2,
    "jamba-v0.1": jamba,
    "bert-base": lambda c: bert(c, 512, 2),
    "roberta-base": lambda c: bert(c, 514, 1),
    "t5-small": lambda c: t5(c, 1),
    "flan-t5-base": lambda c: t5(c, 2),
    "vit-base-patch16-224": vit,
}
