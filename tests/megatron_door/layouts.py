"""Tiny real Megatron models under any parallel layout, on gloo; runs in the rank processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from blockwise_lr.megatron.mapping import global_names

VOCABULARY, LENGTH, HEADS = 64, 12, 4
# what the variants differ in: TransformerConfig, GPTModel
VARIANTS: dict[str, tuple[dict, dict]] = {
    "gpt": (
        dict(normalization="LayerNorm"),
        dict(position_embedding_type="learned_absolute", share_embeddings_and_output_weights=False),
    ),
    "gqa": (
        dict(
            num_query_groups=2,
            normalization="RMSNorm",
            gated_linear_unit=True,
            add_bias_linear=False,
            activation_func=torch.nn.functional.silu,
            qk_layernorm=True,
        ),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=True),
    ),
    "llama": (
        dict(
            num_query_groups=2,
            normalization="RMSNorm",
            gated_linear_unit=True,
            add_bias_linear=False,
            activation_func=torch.nn.functional.silu,
        ),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=True),
    ),
    # one query group, which tensor-parallel ranks share
    "shared_group": (
        dict(num_query_groups=1, normalization="RMSNorm", add_bias_linear=False),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=True),
    ),
    # gated delta nets in place of attention
    "delta": (
        dict(
            linear_key_head_dim=8,
            linear_value_head_dim=6,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            deterministic_mode=True,
            activation_func=torch.nn.functional.silu,
            gated_linear_unit=True,
            normalization="RMSNorm",
            add_bias_linear=False,
        ),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=True),
    ),
    # more embedding than anything else, so that shard edges cut it
    "many_words": (
        dict(normalization="RMSNorm", add_bias_linear=False),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=True),
    ),
    "moe": (
        dict(
            num_moe_experts=4,
            moe_router_topk=2,
            add_bias_linear=False,
            normalization="RMSNorm",
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            moe_shared_expert_intermediate_size=24,
        ),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=False),
    ),
    # latent attention, and a head that predicts the token after the next
    "deepseek": (
        dict(
            multi_latent_attention=True,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_head_dim=8,
            v_head_dim=6,
            qk_pos_emb_head_dim=4,
            rope_type="rope",
            qk_layernorm=True,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            mtp_num_layers=1,
        ),
        dict(position_embedding_type="rope", share_embeddings_and_output_weights=True),
    ),
}


def vocabulary(variant: str) -> int:
    """Rows of a variant's embedding."""
    return 1021 if variant == "many_words" else VOCABULARY


@dataclass(frozen=True)
class Layout:
    """How a case is spread over its ranks; what is left over is data parallel."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1  # of experts, where ep is not 1
    cp: int = 1
    instances: int = 1  # of the distributed optimizer
    sp: bool = False
    distributed: bool = False
    bf16: bool = False
    overlap: bool = False  # of communication and computation: gradients, and with ``distributed`` parameters
    layers: int = 2  # virtual stages need four
    extra: dict = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{name}{value}" for name, value in vars(self).items() if isinstance(value, int) and value > 1]
        parts.remove(f"layers{self.layers}")
        return (
            ".".join(parts + [name for name in ("sp", "distributed", "bf16", "overlap") if getattr(self, name)]) or "dp"
        )


@contextmanager
def megatron(layout: Layout) -> Iterator[None]:
    """Real Megatron on the CPU with that layout's process groups, all of it given back afterwards."""
    from blockwise_lr.patches.megatron_on_cpu import PATCH

    undo = PATCH.apply()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    others = set(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        num_distributed_optimizer_instances=layout.instances,
        expert_tensor_parallel_size=layout.etp if layout.ep > 1 else None,
        create_gloo_process_groups=False,
    )
    groups = set(dist.distributed_c10d._world.pg_map) - others  # without those that DeepSpeed keeps for later cases
    random.model_parallel_cuda_manual_seed(1)
    try:
        yield
        dist.barrier()
        # Megatron only forgets its groups, and each has three threads, of which one polls its sockets
        for group in groups:
            dist.destroy_process_group(group)
    finally:
        parallel_state.destroy_model_parallel()
        if "deepspeed.utils.groups" in sys.modules:  # it keeps the last engine's mpu and asks it in engines without one
            sys.modules["deepspeed.utils.groups"].mpu = None
        undo()


def make_config(variant: str, layout: Layout) -> Any:
    """The TransformerConfig of a variant under a layout."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    latent = VARIANTS[variant][0].get("multi_latent_attention", False)
    return (MLATransformerConfig if latent else TransformerConfig)(
        **{
            **dict(
                num_layers=layout.layers,
                hidden_size=32,
                num_attention_heads=HEADS,
                ffn_hidden_size=48,
                use_cpu_initialization=True,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                tensor_model_parallel_size=layout.tp,
                bias_dropout_fusion=False,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp if layout.ep > 1 else None,
                # with 2 stages, messages of the interleaved schedule pair up only when sent one by one, as Megatron's
                # flags ensure
                overlap_p2p_comm=bool(layout.vpp),
                batch_p2p_comm=not layout.vpp,
                context_parallel_size=layout.cp,
                sequence_parallel=layout.sp,
                bias_activation_fusion=False,
                masked_softmax_fusion=False,
                gradient_accumulation_fusion=False,
                persist_layer_norm=False,
                pipeline_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
                bf16=layout.bf16,
                params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
            ),
            **VARIANTS[variant][0],
            **layout.extra,
        }
    )


def build_chunks(variant: str, layout: Layout) -> list[torch.nn.Module]:
    """This rank's bare model chunks."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron_door.parts import delta_net_spec, replace_refused_parts

    config = make_config(variant, layout)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        multi_latent_attention=config.multi_latent_attention,
    )
    if variant == "delta":
        layer.submodules.self_attention = delta_net_spec()
    replace_refused_parts(layer, config)
    chunks = []
    for stage in range(layout.vpp or 1):
        number = stage if layout.vpp else None
        where = dict(ignore_virtual=False, vp_stage=number)
        chunks.append(
            GPTModel(
                config,
                block_spec(config, layer, number),
                vocabulary(variant),
                LENGTH,
                mtp_block_spec=mtp_spec(config, layer, number),
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                vp_stage=number,
                **VARIANTS[variant][1],
            )
        )
    return chunks


def block_spec(config: Any, layer: Any, stage: int | None) -> Any:
    """The spec of a chunk's decoder; the layer's is enough unless its final norm has to be another one."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron_door.parts import marked_norm

    if not config.sequence_parallel:
        return layer
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, stage), marked_norm(config))


def mtp_spec(config: Any, layer: Any, stage: int | None) -> Any:
    """The spec of the heads that predict later tokens, where the config and this stage have them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron_door.parts import marked_norm

    spec = get_gpt_mtp_block_spec(config, layer, False, stage) if config.mtp_num_layers else None
    if spec is not None and config.sequence_parallel:
        for head in spec.layer_specs:
            head.submodules.enorm = head.submodules.hnorm = head.submodules.layer_norm = marked_norm(config)
    return spec


def full_names(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the single-process model, parameter): global layers, global experts, the tied output layer's real name."""
    from megatron.core import parallel_state

    for chunk in chunks:
        for name, p in global_names(chunk):
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                if not getattr(p, "shared_embedding", False):
                    continue  # not in use: the last stage has a copy of the embedding for its MTP head
                name = "embedding.word_embeddings.weight"
            if ".local_experts." in name:
                before, after = name.split(".local_experts.")
                number, rest = after.split(".", 1)
                count = 4 // parallel_state.get_expert_model_parallel_world_size()
                number = int(number) + count * parallel_state.get_expert_model_parallel_rank()
                name = f"{before}.local_experts.{number}.{rest}"
            yield name, p


def own_slice(full: torch.Tensor, name: str, p: torch.Tensor, config: Any) -> torch.Tensor:
    """This tensor-parallel rank's slice of a full parameter."""
    from megatron.core import parallel_state

    if not getattr(p, "tensor_model_parallel", False) or full.shape == p.shape:
        return full
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if ".local_experts." in name:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    is_gated = config.gated_linear_unit and ".linear_fc1." in name
    sections = [full.shape[0] // 2] * 2 if is_gated else delta_net_sections(name, config)
    if sections:  # every rank has its part of the gate and its part of the up projection, ...
        return torch.cat([section.chunk(size)[rank] for section in full.split(sections)])
    return full.chunk(size, max(getattr(p, "partition_dim", 0), 0))[rank]


def delta_net_sections(name: str, config: Any) -> list[int]:
    """Rows of a gated delta net's fused weight: queries, keys, values, then gates, betas, alphas; [] of another weight."""
    if not name.endswith(("self_attention.in_proj.weight", "self_attention.conv1d.weight")):
        return []
    keys = config.linear_key_head_dim * config.linear_num_key_heads
    values = config.linear_value_head_dim * config.linear_num_value_heads
    return [keys, keys, values, *([values, *[config.linear_num_value_heads] * 2] if "in_proj" in name else [])]


def load_full(chunks: list[torch.nn.Module], weights: dict[str, torch.Tensor]) -> None:
    """Copies a single-process model's weights into this rank's chunks."""
    with torch.no_grad():
        for name, p in full_names(chunks):
            p.copy_(own_slice(weights[name], name, p, chunks[0].config))


def gather_full(
    chunks: list[torch.nn.Module],
    like: dict[str, torch.Tensor],
    masters: dict[int, tuple[int, torch.Tensor]] | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """The whole model's fp32 weights, from all ranks, and how far any two ranks' copies of an element are apart.

    Args:
        masters: id of a bf16 parameter -> (where in it the shard begins, this rank's fp32 shard).
    """
    pieces = []
    for name, p in full_names(chunks):
        index = own_slice(torch.arange(like[name].numel()).view(like[name].shape), name, p, chunks[0].config).reshape(
            -1
        )
        if masters is None:
            start, value = 0, p
        elif id(p) in masters:
            start, value = masters[id(p)]
        else:
            continue  # another rank holds it
        pieces.append((name, index[start : start + value.numel()], value.detach().float().reshape(-1).clone()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    found = {name: torch.full((value.numel(),), float("nan")) for name, value in like.items()}
    apart = 0.0
    for rank_pieces in everyone:
        for name, index, value in rank_pieces:
            before = found[name][index]
            seen = ~before.isnan()
            if seen.any():
                apart = max(apart, float((before[seen] - value[seen]).abs().max()))
            found[name][index] = value
    return {name: value.view(like[name].shape) for name, value in found.items()}, apart
