"""Names and shapes of models that are not in transformers: nanoGPT, torchtitan, and repositories with remote code.

Each function returns a module of meta parameters with the names of the published code, and no forward pass.
"""

from __future__ import annotations

import torch

from ..blocks.skeleton import Shapes, Skeleton, layers


def nanogpt(*, n_embd: int, n_layer: int, n_head: int, vocab_size: int, block_size: int) -> torch.nn.Module:
    """karpathy/nanoGPT, model.py: GPT-2's names with plain linear layers; bias=False, head tied to wte."""
    model = Skeleton(
        {
            "transformer.wte.weight": (vocab_size, n_embd),
            "transformer.wpe.weight": (block_size, n_embd),
            **layers(
                n_layer,
                "transformer.h",
                {
                    "ln_1.weight": (n_embd,),
                    "attn.c_attn.weight": (3 * n_embd, n_embd),
                    "attn.c_proj.weight": (n_embd, n_embd),
                    "ln_2.weight": (n_embd,),
                    "mlp.c_fc.weight": (4 * n_embd, n_embd),
                    "mlp.c_proj.weight": (n_embd, 4 * n_embd),
                },
            ),
            "transformer.ln_f.weight": (n_embd,),
            "lm_head.weight": (vocab_size, n_embd),
        },
        {"n_head": n_head},
    )
    model.tie("lm_head.weight", "transformer.wte.weight")
    return model


def torchtitan_llama(
    *, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_hidden: int, vocab_size: int
) -> torch.nn.Module:
    """pytorch/torchtitan, models/llama3: the names of Meta's own LLaMA code."""
    kv = dim // n_heads * n_kv_heads
    return Skeleton(
        {
            "tok_embeddings.weight": (vocab_size, dim),
            **layers(
                n_layers,
                "layers",
                {
                    "attention.wq.weight": (dim, dim),
                    "attention.wk.weight": (kv, dim),
                    "attention.wv.weight": (kv, dim),
                    "attention.wo.weight": (dim, dim),
                    "feed_forward.w1.weight": (ffn_hidden, dim),
                    "feed_forward.w2.weight": (dim, ffn_hidden),
                    "feed_forward.w3.weight": (ffn_hidden, dim),
                    "attention_norm.weight": (dim,),
                    "ffn_norm.weight": (dim,),
                },
            ),
            "norm.weight": (dim,),
            "output.weight": (vocab_size, dim),
        },
        {"n_heads": n_heads, "n_kv_heads": n_kv_heads},
    )


def _llama_shell(
    attention: Shapes, hidden_size: int, intermediate_size: int, num_hidden_layers: int, vocab_size: int
) -> Shapes:
    return {
        "model.embed_tokens.weight": (vocab_size, hidden_size),
        **layers(
            num_hidden_layers,
            "model.layers",
            {
                **attention,
                "mlp.gate_proj.weight": (intermediate_size, hidden_size),
                "mlp.up_proj.weight": (intermediate_size, hidden_size),
                "mlp.down_proj.weight": (hidden_size, intermediate_size),
                "input_layernorm.weight": (hidden_size,),
                "post_attention_layernorm.weight": (hidden_size,),
            },
        ),
        "model.norm.weight": (hidden_size,),
        "lm_head.weight": (vocab_size, hidden_size),
    }


def internlm(
    *, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, vocab_size: int
) -> torch.nn.Module:
    """internlm/internlm-7b, modeling_internlm.py: LLaMA's names with biases in the attention."""
    attention: Shapes = {
        f"self_attn.{name}_proj.{kind}": (hidden_size, hidden_size) if kind == "weight" else (hidden_size,)
        for name in "qkvo"
        for kind in ("weight", "bias")
    }
    return Skeleton(
        _llama_shell(attention, hidden_size, intermediate_size, num_hidden_layers, vocab_size),
        {"model_type": "internlm", "num_attention_heads": num_attention_heads},
    )


def baichuan(
    *, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, vocab_size: int
) -> torch.nn.Module:
    """baichuan-inc/Baichuan2-7B-Base, modeling_baichuan.py: LLaMA's names with one W_pack for q, k and v."""
    attention: Shapes = {
        "self_attn.W_pack.weight": (3 * hidden_size, hidden_size),
        "self_attn.o_proj.weight": (hidden_size, hidden_size),
    }
    return Skeleton(
        _llama_shell(attention, hidden_size, intermediate_size, num_hidden_layers, vocab_size),
        {"model_type": "baichuan", "num_attention_heads": num_attention_heads},
    )


def internlm2(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
) -> torch.nn.Module:
    """internlm/internlm2-7b, modeling_internlm2.py: wqkv holds, per key head, its query heads, k and v."""
    fused = hidden_size // num_attention_heads * (num_attention_heads + 2 * num_key_value_heads)
    return Skeleton(
        {
            "model.tok_embeddings.weight": (vocab_size, hidden_size),
            **layers(
                num_hidden_layers,
                "model.layers",
                {
                    "attention.wqkv.weight": (fused, hidden_size),
                    "attention.wo.weight": (hidden_size, hidden_size),
                    "feed_forward.w1.weight": (intermediate_size, hidden_size),
                    "feed_forward.w2.weight": (hidden_size, intermediate_size),
                    "feed_forward.w3.weight": (intermediate_size, hidden_size),
                    "attention_norm.weight": (hidden_size,),
                    "ffn_norm.weight": (hidden_size,),
                },
            ),
            "model.norm.weight": (hidden_size,),
            "output.weight": (vocab_size, hidden_size),
        },
        {
            "model_type": "internlm2",
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
        },
    )


def chatglm(
    *,
    hidden_size: int,
    ffn_hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    multi_query_group_num: int,
    padded_vocab_size: int,
) -> torch.nn.Module:
    """THUDM/glm-4-9b, modeling_chatglm.py: all q, then the k and v of a few heads; gate and up in one weight."""
    fused = hidden_size // num_attention_heads * (num_attention_heads + 2 * multi_query_group_num)
    return Skeleton(
        {
            "transformer.embedding.word_embeddings.weight": (padded_vocab_size, hidden_size),
            **layers(
                num_layers,
                "transformer.encoder.layers",
                {
                    "input_layernorm.weight": (hidden_size,),
                    "self_attention.query_key_value.weight": (fused, hidden_size),
                    "self_attention.query_key_value.bias": (fused,),
                    "self_attention.dense.weight": (hidden_size, hidden_size),
                    "post_attention_layernorm.weight": (hidden_size,),
                    "mlp.dense_h_to_4h.weight": (2 * ffn_hidden_size, hidden_size),
                    "mlp.dense_4h_to_h.weight": (hidden_size, ffn_hidden_size),
                },
            ),
            "transformer.encoder.final_layernorm.weight": (hidden_size,),
            "transformer.output_layer.weight": (padded_vocab_size, hidden_size),
        },
        {
            "model_type": "chatglm",
            "num_attention_heads": num_attention_heads,
            "multi_query_group_num": multi_query_group_num,
        },
    )
