"""Clipping by block type on real megatron-core, against torch's own on the leaves of one unfused process."""

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout
from megatron_door.training import parity, prepared
from ranks import pool

LIMITS = {"embedding": 0.02, "qk": 1e-3, "ffn": 0.02, "norm": 2e-3}
ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
PERCENTILES = {"embedding": "50%", "qk": "20%", "ffn": 0.02, "norm": "100%"}
CASES = [
    (ADAMW, "gqa", 2, Layout(tp=2), LIMITS),
    (ADAMW, "gpt", 2, Layout(pp=2), LIMITS),  # whose tied embedding lies on both stages
    (ADAMW, "gqa", 4, Layout(tp=2, pp=2, distributed=True), LIMITS),
    (MINI, "gqa", 4, Layout(tp=2, sp=True, distributed=True), LIMITS),
    (ADAMW, "gqa", 2, Layout(cp=2, distributed=True), LIMITS),
    (ADAMW, "moe", 2, Layout(ep=2), LIMITS),  # experts have an optimizer of their own
    (ADAMW, "moe", 4, Layout(tp=2, ep=2, sp=True, distributed=True), LIMITS),
    (ADAMW, "gqa", 4, Layout(tp=2, pp=2, distributed=True), PERCENTILES),
    (MINI, "moe", 2, Layout(ep=2), PERCENTILES),
]


def clipped(variant, kind, layout, limits):
    return parity(variant, kind, layout, block_clip=limits)


@pytest.mark.parametrize("kind, variant, ranks, layout, limits", CASES, ids=str)
def test_norms_are_those_of_the_whole_model(kind, variant, ranks, layout, limits):
    prepared(variant, kind, 10, layers=layout.layers, limits=tuple(limits.items()))
    for result in pool(ranks).run(clipped, variant, kind, layout, limits):
        assert result["worst"] < 1e-5 and result["apart"] == 0.0, result


def test_the_limits_bind():
    """What the above compares is another result than without them."""
    assert pool(1).run(differs)[0] > 1e-3


def differs():
    from megatron_door.training import reference, worst

    _, plain, _ = reference("gqa", ADAMW, 10)
    _, clipped, _ = reference("gqa", ADAMW, 10, limits=tuple(LIMITS.items()))
    return worst(clipped, plain)["worst"]
