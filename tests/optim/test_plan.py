"""Step plans against every element's block and segment written out one by one; and their size at 70B."""

import itertools
import random

import numpy as np
import pytest
from plan_70b import TENSOR_PARALLEL, WAYS, kept_bytes, llama_70b, rank_plans
from random_layouts import pieces_and_segments, random_layouts

from blockwise_lr.blocks import ParamLayout
from blockwise_lr.optim import Fragment
from blockwise_lr.plan.step_plan import (
    CLASS,
    INNER,
    OFFSET,
    OUTER,
    SLOT,
    SLOT_STEP,
    STRIDE,
    UNIT,
    element_plan,
    segment_plan,
    shared_segments,
    slot_numel,
)


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
    for low, high in itertools.pairwise(edges):
        plan = element_plan(high - low + 7, [Fragment(layout.name, int(low), int(high - low), 7)], [layout])
        covered = np.zeros(high - low + 7, np.int64)
        for row in plan.local.table:
            at, _ = elements(row, 0)
            covered[at] += 1
            assert {layout.pieces[i].block for i in piece[at - 7 + low]} == {plan.classes[row[CLASS]].block}
        assert covered[:7].sum() == 0 and (covered[7:] == 1).all() and not len(plan.shared)


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
    for low, high in itertools.pairwise(edges):
        plan = segment_plan(high - low, [Fragment(layout.name, int(low), int(high - low), 0)], [layout])
        key_of_slot = {run.slot + i: (run.piece, run.first + i) for run in plan.runs for i in range(run.count)}
        covered = np.zeros(high - low, np.int64)
        for rectangles, is_cut in ((plan.local, False), (plan.shared, True)):
            for row, numel in zip(rectangles.table, rectangles.segment_numel):
                at, slots = elements(row, numel)
                covered[at] += 1
                for place, slot in zip(at + low, slots):
                    key = (piece[place], segment[place])
                    assert key_of_slot[slot] == key and numel == numels[key]
                    assert is_cut or len(owners[key]) == 1
        assert (covered == 1).all()
        slots, sizes = slot_numel(plan.shared)
        assert all(numels[key_of_slot[slot]] == size for slot, size in zip(slots, sizes))
    for index in range(len(layout.pieces)):
        wanted = sorted(s for (p, s), shards in owners.items() if p == index and len(shards) > 1)
        found = shared_segments(layout, index, edges[1:-1])
        assert set(wanted) <= set(found.tolist()) and (np.diff(found) > 0).all()
        if layout.kind == "matrix" and not layout.transposed:  # others may be reduced though one shard has all of them
            assert found.tolist() == wanted


@pytest.mark.timeout(60)  # `make bench` prints the time, 0.1 s; the promise is 5 s
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_of_70b_keeps_its_plan_small(way):
    assert sum(layout.numel for layout in llama_70b().values()) * TENSOR_PARALLEL > 70e9
    shards, plans, sync = rank_plans(way)
    held = sum(fragment.numel for _, fragments in shards.flats for fragment in fragments)
    assert kept_bytes(shards, plans, sync) < 5e6  # the promise is 50 MB
    assert [plan.local.numel + plan.shared.numel for plan in plans] == [held, held]
    assert 0 < sync.over_shards[0].size < 20_000  # floats in the step's one all-reduce
