"""What the door refuses, leaves alone and counts, on real megatron-core."""

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout, build_chunks, megatron
from ranks import pool


def with_an_unknown_module_on_the_last_stage(strict):
    """Pipeline stage 1 alone has a parameter that no rule knows."""
    import torch
    from megatron.core import parallel_state
    from megatron_door.training import make_optimizer, wrap

    import blockwise_lr.megatron

    with megatron(Layout(pp=2)):
        undo = blockwise_lr.megatron.register(block_strict=strict)
        try:
            chunks = build_chunks("llama", Layout(pp=2))
            if parallel_state.is_pipeline_last_stage():
                chunks[0].decoder.layers[-1].adapter = torch.nn.Linear(32, 32, bias=False)
            return make_optimizer(wrap(chunks, Layout(pp=2)), "blockwise_adamw", Layout(pp=2)) is not None
        finally:
            undo()


def test_an_unmapped_module_stops_every_rank_with_the_same_error():
    errors = pool(2).run(with_an_unknown_module_on_the_last_stage, True, errors=True)
    assert len(errors) == 2
    for error in errors:
        assert "decoder.layers.1.adapter.weight of shape (32, 32)" in str(error)  # the number over both stages
        assert '{"match": "decoder.layers.*.adapter.weight", "block": "ffn"}' in str(error)


def test_an_unmapped_module_trains_when_not_strict():
    assert pool(2).run(with_an_unknown_module_on_the_last_stage, False) == [True, True]


def plain_adam():
    """What Megatron builds for --optimizer adam with our patches applied and without."""
    import torch
    from megatron_door.training import make_optimizer, make_scheduler, wrap

    import blockwise_lr.megatron

    found = []
    with megatron(Layout()):
        for register in (True, False):
            undo = blockwise_lr.megatron.register() if register else lambda: None
            chunks = build_chunks("llama", Layout())
            optimizer = make_optimizer(wrap(chunks, Layout()), "adam", Layout())
            make_scheduler(optimizer).step(2)
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            inner = [type(o.optimizer) is torch.optim.AdamW for o in optimizer.chained_optimizers]
            found.append((inner, groups))
            undo()
    return found


def test_plain_adam_is_untouched():
    ((with_us, without),) = pool(1).run(plain_adam)
    assert with_us == without and with_us[0] == [True]


def schedule_and_buffers():
    """Per-block learning rates of Megatron's scheduler, and how many gradient buffers and groups there are."""
    from megatron_door.training import make_optimizer, make_scheduler, wrap

    import blockwise_lr.megatron
    from blockwise_lr.megatron.build import current_block_lrs

    layout = Layout(distributed=True)
    with megatron(layout):
        undo = blockwise_lr.megatron.register(block_lr_ratios={"preset": "paper", "qk": 5.0})
        try:
            wrapped = wrap(build_chunks("gpt", layout), layout)
            adam = make_optimizer(wrapped, "adam", layout)
            ours = make_optimizer(wrap(build_chunks("gpt", layout), layout), "blockwise_adamw", layout)
            scheduler = make_scheduler(ours)
            rates = []
            for _ in range(13):
                rates.append(current_block_lrs(ours))
                scheduler.step(1)
            return rates, len(adam.param_groups), len(ours.param_groups), len(wrapped[0].buffers)
        finally:
            undo()


def test_megatrons_scheduler_gives_each_block_its_peak_and_one_shared_minimum():
    from megatron_door.training import LR, MIN_LR, megatron_lr

    ratios = {"embedding": 10, "head": 10, "qk": 5, "vo": 4, "ffn": 6, "norm": 1}
    for rates, adam_groups, groups, buffers in pool(1).run(schedule_and_buffers):
        for step, found in enumerate(rates):
            assert {block: len(lrs) for block, lrs in found.items()} == dict.fromkeys(ratios, 1)
            assert {block: lr for block, (lr,) in found.items()} == pytest.approx(
                {block: megatron_lr(step, ratio) for block, ratio in ratios.items()}
            )
        assert rates[3]["embedding"] == pytest.approx([10 * LR])
        assert [lr for lrs in rates[12].values() for lr in lrs] == pytest.approx([MIN_LR] * 6)
        assert groups == adam_groups and buffers == 1  # block types add neither groups nor gradient buffers


def patches_undone():
    import torch
    from megatron.core import optimizer

    before = optimizer._get_megatron_optimizer_based_on_param_groups
    with megatron(Layout()):
        import blockwise_lr.megatron

        undo = blockwise_lr.megatron.register()
        blockwise_lr.megatron.register()  # twice is harmless
        changed = optimizer._get_megatron_optimizer_based_on_param_groups is not before
        inside = torch.cuda.is_available(), torch.zeros(1, device="cuda").type()
        undo()
    after = optimizer._get_megatron_optimizer_based_on_param_groups is before
    return changed, after, inside, torch.cuda.is_available(), torch.zeros(1).type()


def test_patches_are_given_back():
    assert pool(1).run(patches_undone) == [(True, True, (True, "torch.cuda.FloatTensor"), False, "torch.FloatTensor")]


def collectives(name, layout):
    """How many collectives one iteration takes, forward and backward included, as torch's profiler counts gloo's."""
    import torch
    from megatron_door.training import make_optimizer, train, wrap

    import blockwise_lr.megatron

    with megatron(layout):
        undo = blockwise_lr.megatron.register()
        try:
            wrapped = wrap(build_chunks("llama", layout), layout)
            optimizer = make_optimizer(wrapped, name, layout)
            train(wrapped, optimizer, 1)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                train(wrapped, optimizer, 1)
        finally:
            undo()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:"))


@pytest.mark.parametrize(
    "ranks, layout, more",
    [
        (2, Layout(distributed=True), 1),  # segments cut by shards' edges
        (2, Layout(tp=2), 1),  # rows of row-parallel weights
        (4, Layout(tp=2, distributed=True), 2),  # both, one after the other
    ],
    ids=str,
)
def test_collectives_of_an_iteration(ranks, layout, more):
    adam = pool(ranks).run(collectives, "adam", layout)
    assert adam[0] > 2
    assert pool(ranks).run(collectives, "blockwise_adamw", layout) == adam
    assert pool(ranks).run(collectives, "blockwise_adam_mini", layout) == [count + more for count in adam]


def rates_of_a_preset_by_size(mup):
    from megatron_door.training import make_optimizer, wrap

    import blockwise_lr.megatron

    layout, ratios = Layout(), {"preset": "depth_mup", "base_hidden_size": 8, "base_num_layers": 2}
    with megatron(layout):
        undo = blockwise_lr.megatron.register(block_lr_ratios=ratios)
        try:
            chunks = build_chunks("llama", layout)
            chunks[0].config.use_mup = mup
            optimizer = make_optimizer(wrap(chunks, layout), "blockwise_adamw", layout)
            return optimizer.chained_optimizers[0].optimizer.block_lrs()[0]
        finally:
            undo()


def test_a_preset_by_size_reads_megatrons_config():
    (rates,) = pool(1).run(rates_of_a_preset_by_size, False)
    assert rates["qk"] == rates["ffn"] == pytest.approx(rates["embedding"] / 4)
    (error,) = pool(1).run(rates_of_a_preset_by_size, True, errors=True)
    assert "--use-mup and the preset depth_mup of --block-lr-ratios both scale learning rates by width" in str(error)
