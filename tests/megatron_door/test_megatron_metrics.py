"""Figures per block type on real megatron-core, beside sums over the leaves of one unfused process."""

import math

import pytest
import torch

pytest.importorskip("megatron.core")

from kinds import KINDS
from megatron_door.layouts import Layout, build_chunks, gather_full, load_full, make_config, megatron
from megatron_door.training import BATCH, BETAS, CLIP, batches, make_optimizer, start_model, train, wrap
from megatron_door.twin import MegatronTwin
from ranks import pool
from references import once

from blockwise_lr.measure import BlockMonitor

CASES = [
    ("gqa", 2, Layout(tp=2)),
    ("gpt", 2, Layout(pp=2)),
    ("gqa", 4, Layout(tp=2, pp=2, distributed=True)),  # whose tied embedding lies on both stages
    ("gqa", 2, Layout(cp=2)),
    ("moe", 4, Layout(tp=2, ep=2, sp=True, distributed=True)),  # experts have an optimizer of their own
]


@once
def start(kind):
    """Weights at the start, and per block type the norm, the sum and the largest of the first step's squares."""
    with megatron(Layout()):
        twin = MegatronTwin(start_model(kind))
        first = {name: value.detach().clone() for name, value in twin.values().items()}
        for ids in batches(1)[0].split(1):
            twin.backward(ids, 1 / BATCH)
        twin.clip(CLIP)
        blocks = {name: leaf.block for name, leaf in twin.leaves.items()}
        squares = {}
        for leaf in twin.leaves.values():
            squares.setdefault(leaf.block, []).append(leaf.tensor.grad.double().square().flatten())
    return first, blocks, {block: torch.cat(found) for block, found in squares.items()}


def computed(kind):
    start(kind)


def sizes(kind, values, blocks):
    """Root mean squares by block type of whole tensors; the twin tells a fused one's parts."""
    twin, found = MegatronTwin.__new__(MegatronTwin), {}
    twin.config = make_config(kind, Layout())
    for name, value in values.items():
        for part, rows in twin._split(name, value).items():
            found.setdefault(blocks[part], []).append(rows.double().square().flatten())
    return {block: math.sqrt(torch.cat(parts).mean()) for block, parts in found.items()}


def differences(kind, layout):
    """The worst relative difference of any figure."""
    import blockwise_lr.megatron

    first, blocks, squares = start(kind)
    with megatron(layout):
        undo = blockwise_lr.megatron.register()
        try:
            chunks = build_chunks(kind, layout)
            load_full(chunks, first)
            wrapped = wrap(chunks, layout)
            optimizer = make_optimizer(wrapped, KINDS["BlockwiseAdamW"].megatron, layout)
            monitor = BlockMonitor(*blockwise_lr.megatron.optimizers_of(optimizer), every=1)
            seen, weights = [], []

            def after():
                seen.append(monitor.report())
                weights.append(gather_full(chunks, first, None)[0])

            train(wrapped, optimizer, 2, after)
        finally:
            undo()
    expected = {f"weight_rms/{block}": size for block, size in sizes(kind, weights[1], blocks).items()}
    moved = sizes(kind, {name: weights[1][name] - weights[0][name] for name in first}, blocks)
    expected.update({f"update_rms/{block}": size for block, size in moved.items()})
    of_first = {}
    for block, found in squares.items():
        of_first[f"gradient_norm/{block}"] = float(found.sum().sqrt())
        of_first[f"variance_l1/{block}"] = (1 - BETAS[1]) * float(found.sum())
        of_first[f"variance_max/{block}"] = (1 - BETAS[1]) * float(found.max())
    assert {name for name in seen[0] if "variance" in name or "gradient" in name} == set(of_first)
    assert set(expected) <= set(seen[1])
    return {
        **{name: abs(seen[0][name] / value - 1) for name, value in of_first.items()},
        **{name: abs(seen[1][name] / value - 1) for name, value in expected.items()},
    }


@pytest.mark.parametrize("kind, ranks, layout", CASES, ids=str)
def test_every_element_counts_once(kind, ranks, layout):
    pool(1).run(computed, kind)
    for found in pool(ranks).run(differences, kind, layout):
        name = max(found, key=found.get)
        assert found[name] < 1e-4, (name, found[name])
