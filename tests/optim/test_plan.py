"""Step plans against every element's block and segment written out one by one; and their size at 70B."""
import random

import numpy as np
import pytest
import torch

from blockwise_lr.blocks import BlockMap, ParamLayout
from blockwise_lr.blocks.block_map import map_names
from blockwise_lr.blocks.dims import head_counts
from blockwise_lr.optim import Cut, Fragment, ShardMap
from blockwise_lr.optim.plan import (CLASS, INNER, OFFSET, OUTER, SLOT, SLOT_STEP, STRIDE, UNIT, adam_mini_plan,
                                     adamw_plan, cut_segments, slot_numel)
from blockwise_lr.optim.segment_sync import sync_of
from blockwise_lr.optim.shards import even_cuts
from random_layouts import pieces_and_segments, random_layouts


def elements(row: np.ndarray, numel: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the flat tensor that a rectangle covers, and their slots."""
    run, along = np.arange(row[OUTER])[:, None], np.arange(row[INNER])
    slots = row[SLOT] + run * row[SLOT_STEP] + along // row[UNIT] if numel else 0 * run * along
    return (row[OFFSET] + run * row[STRIDE] + along).ravel(), slots.ravel()


def random_shards(rng: random.Random, layout: ParamLayout) -> np.ndarray:
    """Edges of shards, 0 and the end among them."""
    inside = rng.sample(range(1, layout.numel), min(rng.randint(0, 4), layout.numel - 1))
    return np.array([0, *sorted(inside), layout.numel])


CASES = [(seed, number) for seed in range(12) for number in range(8)]


@pytest.mark.parametrize("seed,number", CASES)
def test_adamw_covers_every_element_once_with_its_block(seed, number):
    rng = random.Random(seed)
    layout = random_layouts(rng)[number]
    piece, _ = pieces_and_segments(layout)
    edges = random_shards(rng, layout)
    for low, high in zip(edges, edges[1:]):
        plan = adamw_plan(high - low + 7, [Fragment(layout.name, int(low), int(high - low), 7)], [layout])
        covered = np.zeros(high - low + 7, np.int64)
        for row in plan.whole.table:
            at, _ = elements(row, 0)
            covered[at] += 1
            assert {layout.pieces[i].block for i in piece[at - 7 + low]} == {plan.classes[row[CLASS]].block}
        assert covered[:7].sum() == 0 and (covered[7:] == 1).all() and not len(plan.cut)


@pytest.mark.parametrize("seed,number", CASES)
def test_adam_mini_gives_every_element_its_segment_and_knows_the_cut_ones(seed, number):
    rng = random.Random(seed)
    layout = random_layouts(rng)[number]
    piece, segment = pieces_and_segments(layout)
    edges = random_shards(rng, layout)
    shard_of = np.searchsorted(edges, np.arange(layout.numel), "right")
    owners = {}
    for key, shard in zip(zip(piece, segment), shard_of):
        owners.setdefault(key, set()).add(shard)
    numels = {}
    for key in zip(piece, segment):
        numels[key] = numels.get(key, 0) + 1
    for low, high in zip(edges, edges[1:]):
        plan = adam_mini_plan(high - low, [Fragment(layout.name, int(low), int(high - low), 0)], [layout])
        key_of_slot = {run.slot + i: (run.piece, run.first + i) for run in plan.runs for i in range(run.count)}
        covered = np.zeros(high - low, np.int64)
        for rectangles, is_cut in ((plan.whole, False), (plan.cut, True)):
            for row, numel in zip(rectangles.table, rectangles.segment_numel):
                at, slots = elements(row, numel)
                covered[at] += 1
                for place, slot in zip(at + low, slots):
                    key = (piece[place], segment[place])
                    assert key_of_slot[slot] == key and numel == numels[key]
                    assert is_cut or len(owners[key]) == 1
        assert (covered == 1).all()
        slots, sizes = slot_numel(plan.cut)
        assert all(numels[key_of_slot[slot]] == size for slot, size in zip(slots, sizes))
    for index in range(len(layout.pieces)):
        wanted = sorted(s for (p, s), shards in owners.items() if p == index and len(shards) > 1)
        found = cut_segments(layout, index, edges[1:-1])
        assert set(wanted) <= set(found.tolist()) and (np.diff(found) > 0).all()
        if layout.kind == "matrix" and not layout.transposed:  # others may be reduced though one shard has all of them
            assert found.tolist() == wanted


HIDDEN, FFN, LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD = 8192, 28672, 80, 128256, 64, 8, 128
TENSOR_PARALLEL, DATA_PARALLEL, RANK = 8, 512, 200


def llama_70b() -> BlockMap:
    """One tensor-parallel slice of LLaMA-3 70B, by names and shapes alone."""
    heads, kv_heads, ffn = (n // TENSOR_PARALLEL for n in (HEADS, KV_HEADS, FFN))
    shapes = {"model.embed_tokens.weight": (VOCABULARY // TENSOR_PARALLEL, HIDDEN)}
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{layer}.self_attn.q_proj.weight": (heads * HEAD, HIDDEN),
                   f"{layer}.self_attn.k_proj.weight": (kv_heads * HEAD, HIDDEN),
                   f"{layer}.self_attn.v_proj.weight": (kv_heads * HEAD, HIDDEN),
                   f"{layer}.self_attn.o_proj.weight": (HIDDEN, heads * HEAD),
                   f"{layer}.mlp.gate_proj.weight": (ffn, HIDDEN), f"{layer}.mlp.up_proj.weight": (ffn, HIDDEN),
                   f"{layer}.mlp.down_proj.weight": (HIDDEN, ffn),
                   f"{layer}.input_layernorm.weight": (HIDDEN,), f"{layer}.post_attention_layernorm.weight": (HIDDEN,)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": shapes["model.embed_tokens.weight"]}
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": HIDDEN, "head_dim": HEAD}
    return map_names(shapes, heads=head_counts(config), family="llama")


def one_buffer(block_map):
    """ZeRO-1 and 2: all parameters one after another, cut evenly."""
    size = -(-sum(layout.numel for layout in block_map.values()) // DATA_PARALLEL)
    begin, fragments, cuts, position = RANK * size, [], {}, 0
    for name, layout in block_map.items():
        low, high = max(position, begin), min(position + layout.numel, begin + size)
        if low < high:
            fragments.append(Fragment(name, low - position, high - low, low - begin))
        cuts[name] = Cut(even_cuts(layout.numel, size, position))
        position += layout.numel
    return size, fragments, cuts


def every_parameter(block_map):
    """ZeRO-3: every parameter cut evenly."""
    fragments, cuts, offset = [], {}, 0
    for name, layout in block_map.items():
        shard = -(-layout.numel // DATA_PARALLEL)
        fragments.append(Fragment(name, RANK * shard, min(shard, layout.numel - RANK * shard), offset))
        cuts[name] = Cut(even_cuts(layout.numel, shard))
        offset += shard
    return offset, fragments, cuts


@pytest.mark.timeout(60)  # seconds on an idle machine: 0.1; the promise is 5
@pytest.mark.parametrize("way", [one_buffer, every_parameter])
def test_a_rank_of_70b_keeps_its_plan_small(way):
    block_map = llama_70b()
    assert sum(layout.numel for layout in block_map.values()) * TENSOR_PARALLEL > 70e9
    numel, fragments, cuts = way(block_map)
    layouts = [block_map[fragment.name] for fragment in fragments]
    plans = [adamw_plan(numel, fragments, layouts), adam_mini_plan(numel, fragments, layouts)]
    sync = sync_of(ShardMap([(torch.empty(numel, device="meta"), fragments)], cuts), plans[1:], block_map)
    kept = sum(plan.nbytes for plan in plans) + sum(cut.positions.nbytes for cut in cuts.values())
    kept += sum(share.slots.nbytes + share.index.nbytes for stage in sync.over_shards for share in stage.shares)
    assert kept < 5e6  # the promise is 50 MB
    assert sum(plan.whole.numel + plan.cut.numel for plan in plans) == 2 * sum(f.numel for f in fragments)
    assert 0 < sync.over_shards[0].size < 20_000  # floats in the step's one all-reduce
