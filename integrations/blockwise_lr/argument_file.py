"""Names and shapes of the GPT model that a Megatron argument file describes, without Megatron and without memory.

Flags that determine shapes are read and others ignored, except those of models with another structure, which are
refused. Names are those of megatron.core.models.gpt.GPTModel in one process: with Transformer Engine, where norms are
fused into the linear layers after them, or with ``--transformer-impl local``.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import NoReturn

import torch

from .blocks import BlockError
from .blocks.skeleton import Shapes, Skeleton, layers

_OTHER_MODELS = (
    "--multi-latent-attention",
    "--hybrid-layer-pattern",
    "--hybrid-override-pattern",
    "--mtp-num-layers",
    "--yaml-cfg",
    "--moe-layer-freq",
    "--spec",
)


def megatron_model(path: Path, vocabulary: int | None = None) -> torch.nn.Module:
    """The model of an argument file, on the meta device.

    Args:
        path: a file with flags as on Megatron's command line, on any number of lines.
        vocabulary: rows of the embedding, if the file does not state them.

    Raises:
        BlockError: a flag is missing, is not a number, or is of a model that cannot be built from flags.
    """
    words = shlex.split(path.read_text(), comments=True)
    other = [word for word in words if word.partition("=")[0] in _OTHER_MODELS]
    if other:
        raise BlockError(
            f"{path}: {other[0]} describes a model that inspect cannot build from its flags; build it in "
            f"Python and give package.module:factory"
        )
    flags = _parser(path).parse_known_args(words)[0]
    rows = flags.padded_vocab_size or flags.vocab_size or vocabulary
    if not rows:
        raise BlockError(
            f"{path} does not say the vocabulary's size (it comes with the tokenizer); give --vocabulary ROWS"
        )
    config = {
        "num_attention_heads": flags.num_attention_heads,
        "num_query_groups": flags.num_query_groups if flags.group_query_attention else flags.num_attention_heads,
    }
    return Skeleton(_shapes(flags, rows), config, family="megatron")


class _Parser(argparse.ArgumentParser):
    def __init__(self, path: Path) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.path = path

    def error(self, message: str) -> NoReturn:
        raise BlockError(f"{self.path}: {message}")


def _parser(path: Path) -> argparse.ArgumentParser:
    parser = _Parser(path)
    for name in ("num-layers", "hidden-size", "num-attention-heads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in (
        "ffn-hidden-size",
        "moe-ffn-hidden-size",
        "num-query-groups",
        "kv-channels",
        "num-experts",
        "moe-shared-expert-intermediate-size",
        "vocab-size",
        "padded-vocab-size",
        "max-position-embeddings",
    ):
        parser.add_argument(f"--{name}", type=int)
    for name in (
        "group-query-attention",
        "swiglu",
        "add-qkv-bias",
        "qk-layernorm",
        "moe-grouped-gemm",
        "untie-embeddings-and-output-weights",
    ):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="bias")
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    return parser


def _shapes(flags: argparse.Namespace, rows: int) -> Shapes:
    H = flags.hidden_size
    shapes: Shapes = {"embedding.word_embeddings.weight": (rows, H)}
    if flags.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (flags.max_position_embeddings or 0, H)
    shapes |= layers(flags.num_layers, "decoder.layers", {**_attention(flags), **_feed_forward(flags)})
    shapes |= _norm("decoder.final_layernorm.", flags)
    if flags.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (rows, H)
    return shapes


def _norm(prefix: str, flags: argparse.Namespace, size: int | None = None) -> Shapes:
    kinds = ("weight",) if flags.normalization == "RMSNorm" else ("weight", "bias")
    return {prefix + kind: (size or flags.hidden_size,) for kind in kinds}


def _linear(prefix: str, outputs: int, inputs: int, bias: bool, number: str = "") -> Shapes:
    weight: Shapes = {f"{prefix}weight{number}": (outputs, inputs)}
    return weight | ({f"{prefix}bias{number}": (outputs,)} if bias else {})


def _attention(flags: argparse.Namespace) -> Shapes:
    H, heads = flags.hidden_size, flags.num_attention_heads
    groups = flags.num_query_groups if flags.group_query_attention else heads
    d = flags.kv_channels or H // heads
    shapes = _norm(
        "input_layernorm." if flags.transformer_impl == "local" else "self_attention.linear_qkv.layer_norm_", flags
    )
    shapes |= _linear("self_attention.linear_qkv.", (heads + 2 * groups) * d, H, flags.bias or flags.add_qkv_bias)
    shapes |= _linear("self_attention.linear_proj.", H, heads * d, flags.bias)
    if flags.qk_layernorm:
        shapes |= _norm("self_attention.q_layernorm.", flags, d) | _norm("self_attention.k_layernorm.", flags, d)
    return shapes


def _feed_forward(flags: argparse.Namespace) -> Shapes:
    H = flags.hidden_size
    sizes = _linear_sizes(flags, (flags.num_experts and flags.moe_ffn_hidden_size) or flags.ffn_hidden_size or 4 * H)
    fused_norm = flags.transformer_impl != "local" and not flags.num_experts
    shapes = _norm("mlp.linear_fc1.layer_norm_" if fused_norm else "pre_mlp_layernorm.", flags)
    if not flags.num_experts:
        for name, (outputs, inputs) in sizes.items():
            shapes |= _linear("mlp." + name, outputs, inputs, flags.bias)
        return shapes
    shapes["mlp.router.weight"] = (flags.num_experts, H)
    if flags.moe_shared_expert_intermediate_size:
        for name, (outputs, inputs) in _linear_sizes(flags, flags.moe_shared_expert_intermediate_size).items():
            shapes |= _linear("mlp.shared_experts." + name, outputs, inputs, flags.bias)
    for expert in range(flags.num_experts):
        for name, (outputs, inputs) in sizes.items():
            if flags.moe_grouped_gemm:
                shapes |= _linear("mlp.experts." + name, outputs, inputs, flags.bias, str(expert))
            else:
                shapes |= _linear(f"mlp.experts.local_experts.{expert}.{name}", outputs, inputs, flags.bias)
    return shapes


def _linear_sizes(flags: argparse.Namespace, inner: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of both linear layers of a feed-forward network with ``inner`` hidden units."""
    H = flags.hidden_size
    return {"linear_fc1.": (inner * (2 if flags.swiglu else 1), H), "linear_fc2.": (H, inner)}
