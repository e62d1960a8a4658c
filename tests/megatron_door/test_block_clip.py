"""Clipping by block type on real megatron-core, against torch's own on the leaves of one unfused process."""

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout
from megatron_door.training import parity, prepared
from ranks import pool

LIMITS = {"embedding": 0.02, "qk": 1e-3, "ffn": 0.02, "norm": 2e-3}
ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
CASES = [
    (ADAMW, "gqa", 2, Layout(tp=2)),
    (ADAMW, "gpt", 2, Layout(pp=2)),  # whose tied embedding lies on both stages
    (ADAMW, "gqa", 4, Layout(tp=2, pp=2, distributed=True)),
    (MINI, "gqa", 4, Layout(tp=2, sp=True, distributed=True)),
    (ADAMW, "gqa", 2, Layout(cp=2, distributed=True)),
    (ADAMW, "moe", 2, Layout(ep=2)),  # experts have an optimizer of their own
    (ADAMW, "moe", 4, Layout(tp=2, ep=2, sp=True, distributed=True)),
]


def clipped(variant, kind, layout):
    return parity(variant, kind, layout, block_clip=LIMITS)


@pytest.mark.parametrize("kind, variant, ranks, layout", CASES, ids=str)
def test_norms_are_those_of_the_whole_model(kind, variant, ranks, layout):
    prepared(variant, kind, 10, layers=layout.layers, limits=tuple(LIMITS.items()))
    for result in pool(ranks).run(clipped, variant, kind, layout):
        assert result["worst"] < 1e-5 and result["apart"] == 0.0, result


def test_the_limits_bind():
    """What the above compares is another result than without them."""
    assert pool(1).run(differs)[0] > 1e-3


def differs():
    from megatron_door.training import reference, worst

    _, plain, _ = reference("gqa", ADAMW, 10)
    _, clipped, _ = reference("gqa", ADAMW, 10, limits=tuple(LIMITS.items()))
    return worst(clipped, plain)["worst"]
