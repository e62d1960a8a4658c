"""Stand-ins, through Megatron's own layer specs, for two parts that its local (CPU) implementation refuses.

Sequence parallelism: ``WrappedTorchNorm`` asserts ``not config.sequence_parallel`` ("sequence parallel not supported by
torch LayerNorm"); Apex's and Transformer Engine's norms mark their weights so that ``finalize_model_grads`` sums their
gradients. Context parallelism: ``DotProductAttention`` asserts ``context_parallel_size == 1`` ("Context parallelism is only
supported by TEDotProductAttention!"). Everything around these two stays Megatron's.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule


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

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(own positions, batch, heads, channels) each -> (own positions, batch, heads * channels)."""
        group = parallel_state.get_context_parallel_group()
        key, value = (gather_from_sequence_parallel_region(part.contiguous(), group=group).repeat_interleave(
            query.shape[2] // part.shape[2], 2) for part in (key, value))
        length, ranks = key.shape[0], group.size()
        mine = context_positions(length, group.rank(), ranks)
        theirs = torch.cat([context_positions(length, rank, ranks) for rank in range(ranks)])
        scores = torch.einsum("sbhc,tbhc->bhst", query, key) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(theirs[None] > mine[:, None], -1e4).softmax(-1)
        return torch.einsum("bhst,tbhc->sbhc", weights, value).flatten(2)


def context_positions(length: int, rank: int, ranks: int) -> torch.Tensor:
    """The positions of a context-parallel rank: chunk ``rank`` from the front and from the back, of 2 x ranks chunks."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if ranks > 1 else chunks[0].new_tensor(range(length))


def replace_refused_parts(submodules: Any, config: Any) -> Any:
    """Puts the stand-ins into a layer's submodules where the config needs them; returns the final norm to use, or None."""
    attention = submodules.self_attention.submodules
    if config.context_parallel_size > 1:
        attention.core_attention = GatheredAttention
    if not config.sequence_parallel:
        return None
    norm = MarkedRMSNorm if config.normalization == "RMSNorm" else MarkedLayerNorm
    submodules.input_layernorm = submodules.pre_mlp_layernorm = norm
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, None) not in (None, IdentityOp):
            setattr(attention, name, norm)
    return norm
