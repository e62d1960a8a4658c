"""Predicted bytes against what every rank of a real Megatron holds, and shards that hold every element once."""

from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist
from ranks import pool

from blockwise_lr.blocks import BlockError
from blockwise_lr.planning import MegatronLayout, MegatronStates

pytest.importorskip("megatron.core")
from megatron_door.layouts import Layout, build_chunks, full_names, make_config, megatron
from megatron_door.training import make_optimizer, train, wrap

KINDS = {"adamw": "blockwise_adamw", "adam_mini": "blockwise_adam_mini"}
SPLIT = {f"account_for_{part}_in_pipeline_split": True for part in ("embedding", "loss")}
CASES = {
    "tp2.pp2.dist.bf16": ("llama", Layout(tp=2, pp=2, distributed=True, bf16=True), 4),
    "tp2.pp2": ("gpt", Layout(tp=2, pp=2), 4),
    "pp2.dp2.dist.bf16.tied": ("llama", Layout(pp=2, distributed=True, bf16=True), 4),
    "tp2.dp2.dist": ("gqa", Layout(tp=2, distributed=True), 4),
    "ep2.dp2.dist.bf16": ("moe", Layout(ep=2, distributed=True, bf16=True), 4),
    "pp4.uneven": ("gpt", Layout(pp=4, layers=6, extra=SPLIT), 4),
    "pp2.vpp2.bf16": ("gpt", Layout(pp=2, vpp=2, bf16=True, layers=4), 2),
}

OF_MINI = {"tp2.pp2.dist.bf16", "pp2.dp2.dist.bf16.tied", "tp2.dp2.dist"}  # the others in the default lane are AdamW's
COMBINATIONS = [
    pytest.param(case, kind, marks=() if (kind == "adam_mini") == (case in OF_MINI) else pytest.mark.full)
    for case in CASES
    for kind in KINDS
]


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def whole(variant, layers):
    """Names and shapes of the model in one process."""
    with megatron(Layout()):
        (model,) = build_chunks(variant, Layout(layers=layers))
        return {name: tuple(p.shape) for name, p in full_names([model])}


def held(variant, layout, kind):
    """Bytes of this rank after a step, and where it stands."""
    from megatron.core import parallel_state

    import blockwise_lr.megatron
    from blockwise_lr.megatron import optimizers_of
    from blockwise_lr.patches.upstream_megatron import parts_of

    with megatron(layout):
        undo = blockwise_lr.megatron.register()
        try:
            wrapped = wrap(build_chunks(variant, layout), layout)
            optimizer = make_optimizer(wrapped, KINDS[kind], layout)
            train(wrapped, optimizer, 1)
            buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
            parameters = sum(
                size_of(buffer.param_data) if buffer.param_data is not None else sum(map(size_of, buffer.params))
                for buffer in buffers
            )
            parts = [part for one in optimizer.chained_optimizers for part in parts_of(one) or ()]
            masters = sum(size_of(part.tensor) for part in parts) if layout.bf16 else 0
            ours = optimizers_of(optimizer)
            moments = sum(
                size_of(state[spec.name]) for one in ours for state in one.state.values() for spec in one.rule.states
            )
            gradients = sum(size_of(buffer.grad_data) for buffer in buffers)
            stage = parallel_state.get_pipeline_model_parallel_rank()
            place = parallel_state.get_data_parallel_rank(with_context_parallel=True)
            return (parameters, gradients, masters, moments), stage, place, dist.get_rank()
        finally:
            undo()


@pytest.mark.parametrize(("case", "kind"), COMBINATIONS)
def test_a_real_rank_holds_what_was_predicted(case, kind):
    variant, layout, ranks = CASES[case]
    (shapes,) = pool(1).run(whole, variant, layout.layers)
    config = make_config(variant, Layout())
    found = MegatronLayout(
        tensor=layout.tp,
        pipeline=layout.pp,
        virtual=layout.vpp or 1,
        expert=layout.ep,
        expert_tensor=layout.etp if layout.ep > 1 else None,
        data=ranks // (layout.tp * layout.pp),
        distributed=layout.distributed,
        vocabulary_multiple=1,
        embedding_as_layer=bool(layout.extra),
        loss_as_layer=bool(layout.extra),
    )
    heads = {"num_attention_heads": config.num_attention_heads, "num_query_groups": config.num_query_groups}
    states = MegatronStates(shapes, heads, found, optimizer=kind, precision="bf16" if layout.bf16 else "fp32")
    seen = set()
    for measured, stage, place, _ in pool(ranks).run(held, variant, layout, kind):
        said = states.of_rank(stage, place)
        assert (said.parameters, said.gradients, said.masters, said.moments) == measured, (stage, place)
        seen.add((stage, place))
    assert len(seen) == layout.pp * found.data


def test_all_ranks_together_hold_every_element_once():
    from blockwise_lr.inspection import load_model

    model = load_model("configs/megatron/llama-0.25b.args", 50304)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layout = MegatronLayout(tensor=2, pipeline=4, data=7)
    states = MegatronStates(shapes, model.config, layout, optimizer="adam_mini")
    for stage in range(4):
        for buffer in states.buffers(stage):
            counts = {place.name: np.zeros(place.numel, dtype=np.int8) for place in buffer.places}
            for rank in range(7):
                for fragment in states.fragments(buffer, rank):
                    counts[fragment.name][fragment.start : fragment.start + fragment.numel] += 1
            assert all((count == 1).all() for count in counts.values())
    names = Counter(place.name for stage in range(4) for buffer in states.buffers(stage) for place in buffer.places)
    assert set(names.values()) == {1} and set(shapes) <= set(names)
    assert states.largest().total >= states.of_rank(2, 3).total


def test_llama_3_70b_on_512_ranks_is_whole(tmp_path):
    """Every rank's shard map is built and checked (tests/bench/scale.py); the sizes follow from Meta's count."""
    from bench.scale import measured

    row = measured("70B", 512, tmp_path)
    elements = 70_553_706_496 + 2 * 768 * 8192  # two tables of 128,256 rows, padded to 129,024
    norms = (2 * 80 + 1) * 8192
    assert row.checked == 64 and row.checkpoint[0] == 14 * (elements + 7 * norms)  # each of 8 slices has the norms
    assert 0.71 < row.checkpoint[1] / row.checkpoint[0] < 0.72 and row.collective[0] == 0 < row.collective[1] < 2**17


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pipeline": 3}, "8 layers do not divide over 3 pipeline stages"),
        ({"tensor": 3}, "3 tensor-parallel ranks"),
        ({"data": 0}, "data parallel size is 0"),
        ({"expert": 4}, "4 expert-parallel ranks of 1 slices do not divide the 1 ranks"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(given, said):
    from blockwise_lr.inspection import load_model

    model = load_model("configs/megatron/llama-0.25b.args", 50304)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(BlockError, match=said):
        MegatronStates(shapes, model.config, MegatronLayout(**given)).largest()


def test_names_of_others_are_refused():
    with pytest.raises(BlockError, match="give a Megatron argument file"):
        MegatronStates({"wte.weight": (4, 4)}, {}, MegatronLayout())
