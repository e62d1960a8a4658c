"""Stand-ins, through Megatron's own layer specs, for parts that its local (CPU) implementation refuses.

Sequence parallelism: ``WrappedTorchNorm`` asserts ``not config.sequence_parallel`` ("sequence parallel not supported
by torch LayerNorm"); Apex's and Transformer Engine's norms mark their weights so that ``finalize_model_grads`` sums
their gradients. Context parallelism: ``DotProductAttention`` asserts ``context_parallel_size == 1`` ("Context
parallelism is only supported by TEDotProductAttention!"). Latent attention: it does not know the ``k_channels`` that
``MLASelfAttention`` passes, and with a column-parallel down projection nobody adds up the gradients that the heads of
the tensor-parallel ranks give the rotary key.
Everything around these parts stays Megatron's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class MarkedLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with parameters marked as Apex's wrapper and Transformer Engine mark them."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        for p in self.parameters():
            p.sequence_parallel = config.sequence_parallel


class MarkedRMSNorm(torch.nn.RMSNorm):
    """The same for RMSNorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel


class GatheredAttention(MegatronModule):
    """Causal attention in which every context-parallel rank gathers all keys and values."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(own positions, batch, heads, channels) each -> (own positions, batch, heads * channels)."""
        group = parallel_state.get_context_parallel_group()
        key, value = (
            gather_from_sequence_parallel_region(part.contiguous(), group=group).repeat_interleave(
                query.shape[2] // part.shape[2], 2
            )
            for part in (key, value)
        )
        length, ranks = key.shape[0], group.size()
        mine = context_positions(length, group.rank(), ranks)
        theirs = torch.cat([context_positions(length, rank, ranks) for rank in range(ranks)])
        scores = torch.einsum("sbhc,tbhc->bhst", query, key) * (self.scale or query.shape[-1] ** -0.5)
        weights = scores.masked_fill(theirs[None] > mine[:, None], -1e4).softmax(-1)
        return torch.einsum("bhst,tbhc->sbhc", weights, value).flatten(2)


class SummedRotaryKey(MLASelfAttention):
    """Latent attention in which the rotary key, one for all heads, gets the gradients of all ranks' heads."""

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        query, key, *rest = super().get_query_key_value_tensors(*arguments, **options)
        own, rotary = key.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], -1)
        rotary = copy_to_tensor_model_parallel_region(rotary[:, :, :1].contiguous())
        return query, torch.cat([own, rotary.expand(*own.shape[:-1], -1)], -1), *rest


def context_positions(length: int, rank: int, ranks: int) -> torch.Tensor:
    """The positions of a context-parallel rank: chunk ``rank`` from the front and from the back, of 2 x ranks chunks."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if ranks > 1 else chunks[0].new_tensor(range(length))


def replace_refused_parts(layer: Any, config: Any) -> None:
    """Puts the stand-ins into a layer's spec where the config needs them."""
    attention = layer.submodules.self_attention
    if config.context_parallel_size > 1 or config.multi_latent_attention:
        attention.submodules.core_attention = GatheredAttention
    if config.multi_latent_attention:
        attention.module = SummedRotaryKey
    if config.sequence_parallel:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = marked_norm(config)
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention.submodules, name, None) not in (None, IdentityOp):
                setattr(attention.submodules, name, marked_norm(config))


def delta_net_spec() -> Any:
    """A gated delta net. flash-linear-attention needs a GPU: Megatron has the rule in PyTorch too, but not the norm of q
    and k."""
    from megatron.core.ssm import gated_delta_net as module
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    common = getattr(module, "common", module)
    common.HAVE_FLA = True
    common.l2norm = functools.partial(torch.nn.functional.normalize, dim=-1)
    return ModuleSpec(
        module.GatedDeltaNet,
        submodules=module.GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=MarkedRMSNorm, out_proj=RowParallelLinear
        ),
    )


def marked_norm(config: Any) -> type[torch.nn.Module]:
    """The norm of a config under sequence parallelism."""
    return MarkedRMSNorm if config.normalization == "RMSNorm" else MarkedLayerNorm
