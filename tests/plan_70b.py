"""The optimizer plans of one rank of LLaMA-3 70B under tensor parallelism 8 and data parallelism 512."""

from __future__ import annotations

import torch

from blockwise_lr.blocks import BlockMap
from blockwise_lr.blocks.block_map import map_names
from blockwise_lr.blocks.dims import head_counts
from blockwise_lr.optim import Fragment, ShardBoundaries, ShardMap
from blockwise_lr.optim.segment_sync import SegmentSync, sync_of
from blockwise_lr.plan.shards import even_boundaries, fragments_within
from blockwise_lr.plan.step_plan import StepPlan, element_plan, segment_plan

HIDDEN, FFN, LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD = 8192, 28672, 80, 128256, 64, 8, 128
TENSOR_PARALLEL, DATA_PARALLEL, RANK = 8, 512, 200


def llama_70b() -> BlockMap:
    """One tensor-parallel slice of LLaMA-3 70B, by names and shapes alone."""
    heads, kv_heads, ffn = (n // TENSOR_PARALLEL for n in (HEADS, KV_HEADS, FFN))
    shapes = {"model.embed_tokens.weight": (VOCABULARY // TENSOR_PARALLEL, HIDDEN)}
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (heads * HEAD, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (kv_heads * HEAD, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (kv_heads * HEAD, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, heads * HEAD),
            f"{layer}.mlp.gate_proj.weight": (ffn, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (ffn, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, ffn),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": shapes["model.embed_tokens.weight"]}
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": HIDDEN, "head_dim": HEAD}
    return map_names(shapes, heads=head_counts(config), family="llama")


def one_buffer(block_map: BlockMap) -> tuple[int, list[Fragment], dict[str, ShardBoundaries]]:
    """ZeRO-1 and 2: all parameters one after another, cut evenly."""
    size = -(-sum(layout.numel for layout in block_map.values()) // DATA_PARALLEL)
    places, cuts, position = [], {}, 0
    for name, layout in block_map.items():
        places.append((name, position, layout.numel))
        cuts[name] = ShardBoundaries(even_boundaries(layout.numel, size, position))
        position += layout.numel
    return size, fragments_within(places, RANK * size, size), cuts


def every_parameter(block_map: BlockMap) -> tuple[int, list[Fragment], dict[str, ShardBoundaries]]:
    """ZeRO-3: every parameter cut evenly."""
    fragments, cuts, offset = [], {}, 0
    for name, layout in block_map.items():
        shard = -(-layout.numel // DATA_PARALLEL)
        fragments.append(Fragment(name, RANK * shard, min(shard, layout.numel - RANK * shard), offset))
        cuts[name] = ShardBoundaries(even_boundaries(layout.numel, shard))
        offset += shard
    return offset, fragments, cuts


WAYS = {"ZeRO-1": one_buffer, "ZeRO-3": every_parameter}


def rank_plans(way: str) -> tuple[ShardMap, list[StepPlan], SegmentSync]:
    """What a rank builds at start: its fragments and cuts, the plans of both optimizers, and Adam-mini's sums."""
    block_map = llama_70b()
    numel, fragments, cuts = WAYS[way](block_map)
    layouts = [block_map[fragment.name] for fragment in fragments]
    plans = [element_plan(numel, fragments, layouts), segment_plan(numel, fragments, layouts)]
    shards = ShardMap([(torch.empty(numel, device="meta"), fragments)], cuts)
    return shards, plans, sync_of(shards, plans[1:], block_map)


def kept_bytes(shards: ShardMap, plans: list[StepPlan], sync: SegmentSync) -> int:
    """Bytes of all tables that stay."""
    shares = [share for stage in sync.over_shards for share in stage.local_to_buffer]
    return (
        sum(plan.nbytes for plan in plans)
        + sum(cut.positions.nbytes for cut in shards.boundaries.values())
        + sum(share.slots.nbytes + share.index.nbytes for share in shares)
    )
