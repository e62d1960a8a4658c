"""What learning rate and weight decay each parameter gets, and what the log says, where param groups differ."""

import itertools

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout, build_chunks, megatron
from ranks import pool

LR, MIN_LR = 2e-3, 1e-4
RATIOS = {"embedding": 10.0, "head": 10.0, "qk": 8.0, "vo": 4.0, "ffn": 6.0, "norm": 1.0}
PAIRS = [
    ("linear_qkv.weight", None),
    ("layernorm", "norm"),
    ("word_embeddings", "embedding"),
    ("position_embeddings", "embedding"),
    ("output_layer", "head"),
    ("linear_proj", "vo"),
    ("linear_fc", "ffn"),
]


def block_of(name):
    return next((block for part, block in PAIRS if part in name), None)


def one_step_without_gradients(variant, settings, options, overrides, layout):
    """{parameter: decay that a step with zero gradients applied}, of parameters of one block type."""
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron_door.training import make_scheduler, wrap

    import blockwise_lr.megatron

    with megatron(layout):
        undo = blockwise_lr.megatron.register(block_lr_ratios=RATIOS, **settings)
        try:
            wrapped = wrap(build_chunks(variant, layout), layout)
            config = OptimizerConfig(
                optimizer="blockwise_adamw",
                lr=LR,
                min_lr=MIN_LR,
                weight_decay=0.1,
                clip_grad=0.0,
                use_distributed_optimizer=layout.distributed,
                **options,
            )
            optimizer = get_megatron_optimizer(
                config, wrapped, overrides and overrides(config), use_gloo_process_groups=False
            )
            make_scheduler(optimizer).step(3)  # the end of the warmup
            with torch.no_grad():
                for _, p in wrapped[0].named_parameters():
                    p.fill_(1.0)
            optimizer.reload_model_params()
            wrapped[0].zero_grad_buffer()
            optimizer.zero_grad()
            optimizer.step()
            wrapped[0].start_param_sync(force_sync=True)
            return {
                name.removeprefix("module."): float((1 - p.double()).mean()) / (LR * RATIOS[block_of(name)])
                for name, p in wrapped[0].named_parameters()
                if block_of(name)
            }
        finally:
            undo()


def undecayed_embeddings(config):
    """Megatron's standard overrides, and a user's own: embeddings do not decay."""
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides

    return {**get_standard_config_overrides(config), ParamKey(name="*word_embeddings*"): {"wd_mult": 0.0}}


QK_NORMS = dict(apply_wd_to_qk_layernorm=True)


def is_qk_norm(name):
    return "q_layernorm" in name or "k_layernorm" in name


@pytest.mark.parametrize(
    "settings, options, overrides, wanted",
    [
        # by Megatron's rule alone
        ({}, {}, None, lambda name, block, vector: 0.0 if vector else 0.1),
        ({}, QK_NORMS, None, lambda name, block, vector: 0.1 if not vector or is_qk_norm(name) else 0.0),
        # the same values said again change nothing
        (
            dict.fromkeys(["embedding", "ffn", "vo"], 0.1),
            QK_NORMS,
            None,
            lambda name, block, vector: 0.1 if not vector or is_qk_norm(name) else 0.0,
        ),
        # other values, where something decays at all
        (
            {"ffn": 0.3, "embedding": 0.0},
            QK_NORMS,
            None,
            lambda name, block, vector: (
                {"ffn": 0.3, "embedding": 0.0}.get(block, 0.1) if not vector else 0.1 if is_qk_norm(name) else 0.0
            ),
        ),
        # norms that are named decay, all of them
        ({"norm": 0.05}, {}, None, lambda name, block, vector: 0.1 if not vector else 0.05 if block == "norm" else 0.0),
        (
            {"norm": 0.05},
            QK_NORMS,
            None,
            lambda name, block, vector: 0.1 if not vector else 0.05 if block == "norm" else 0.0,
        ),
        ({"norm": 0.0}, QK_NORMS, None, lambda name, block, vector: 0.0 if vector else 0.1),
        # what a user's override keeps from decaying does not decay
        (
            {"embedding": 0.2},
            {},
            undecayed_embeddings,
            lambda name, block, vector: 0.0 if vector or block == "embedding" else 0.1,
        ),
    ],
)
def test_block_weight_decay_changes_values_and_not_what_decays(settings, options, overrides, wanted):
    (found,) = pool(1).run(
        one_step_without_gradients,
        "gqa",
        {"block_weight_decay": settings} if settings else {},
        options,
        overrides,
        Layout(distributed=True),
    )
    assert {block_of(name) for name in found} == {"embedding", "vo", "ffn", "norm"} and any(map(is_qk_norm, found))
    for name, decay in found.items():
        vector = "norm" in name or name.endswith("bias")
        assert decay == pytest.approx(wanted(name, block_of(name), vector), abs=2e-3), name


def rates_of_two_models(layout):
    """Rates of a model whose matrices have a quarter of the peak (as --use-mup makes it), and of another one beside it."""
    import torch
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
    from megatron_door.training import make_optimizer, make_scheduler, wrap

    import blockwise_lr.megatron
    from blockwise_lr.megatron.build import current_block_lrs

    with megatron(layout):
        undo = blockwise_lr.megatron.register(block_lr_ratios=RATIOS)
        try:
            config = OptimizerConfig(optimizer="blockwise_adamw", lr=LR, min_lr=MIN_LR, weight_decay=0.1)
            overrides = {
                **get_standard_config_overrides(config),
                ParamKey(name="*linear_*.weight"): {"max_lr": LR / 4, "min_lr": MIN_LR / 4},
            }
            one = get_megatron_optimizer(
                config, wrap(build_chunks("gpt", layout), layout), overrides, use_gloo_process_groups=False
            )
            other = make_optimizer(wrap(build_chunks("gqa", layout), layout), "blockwise_adamw", layout)
            make_scheduler(one).step(3)
            plain = torch.optim.AdamW([torch.zeros(1)])
            return current_block_lrs(one), current_block_lrs(other), current_block_lrs(plain)
        finally:
            undo()


@pytest.mark.parametrize("ranks, layout", [(1, Layout()), (2, Layout(pp=2))], ids=str)
def test_the_rates_of_an_optimizer_are_those_it_uses_on_all_stages(ranks, layout):
    for one, other, plain in pool(ranks).run(rates_of_two_models, layout):
        peaks = {block: ratio * LR for block, ratio in RATIOS.items()}
        # biases have the whole peak, weights a quarter
        wanted = [
            (block, lr)
            for block, peak in peaks.items()
            for lr in ([peak / 4, peak] if block in ("qk", "vo", "ffn") else [peak])
        ]
        found = [(block, lr) for block in RATIOS for lr in sorted(one[block])]
        assert [block for block, _ in found] == [block for block, _ in wanted]
        assert [lr for _, lr in found] == pytest.approx([lr for _, lr in wanted])
        assert {block: len(lrs) for block, lrs in other.items()} == dict.fromkeys(
            ["embedding", "qk", "vo", "ffn", "norm"], 1
        )
        assert {block: lr for block, (lr,) in other.items()} == pytest.approx({block: peaks[block] for block in other})
        assert plain == {}


def rates_of_a_small_ratio(style):
    """The rates over Megatron's whole schedule of a block whose peak lies below the shared minimum, and of all others."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron_door.training import make_optimizer, wrap

    import blockwise_lr.megatron
    from blockwise_lr.megatron.build import current_block_lrs

    layout = Layout(distributed=True)
    with megatron(layout):
        undo = blockwise_lr.megatron.register(block_lr_ratios={**RATIOS, "vo": 0.01, "ffn": 0.05})
        try:
            optimizer = make_optimizer(wrap(build_chunks("llama", layout), layout), "blockwise_adamw", layout)
            scheduler = OptimizerParamScheduler(
                optimizer,
                init_lr=0.0,
                max_lr=LR,
                min_lr=MIN_LR,
                lr_warmup_steps=3,
                lr_decay_steps=12,
                lr_decay_style=style,
                start_wd=0.1,
                end_wd=0.1,
                wd_incr_steps=12,
                wd_incr_style="constant",
                wsd_decay_steps=4,
                lr_wsd_decay_style="exponential",
            )
            found = []
            for _ in range(15):
                found.append({block: lr for block, (lr,) in current_block_lrs(optimizer).items()})
                scheduler.step(1)
            return found
        finally:
            undo()


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD", "inverse-square-root"])
def test_a_block_whose_peak_is_below_min_lr_never_rises_after_the_warmup(style):
    """It stays at its own peak: one rate must not grow while the others decay."""
    (found,) = pool(1).run(rates_of_a_small_ratio, style)
    for block, ratio in {**RATIOS, "vo": 0.01, "ffn": 0.05}.items():
        rates = [step[block] for step in found if block in step]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rates[3:])), (block, rates)
        assert all(lr <= ratio * LR * (1 + 1e-12) for lr in rates), (block, rates)
    assert found[3]["vo"] == pytest.approx(0.01 * LR) == found[14]["vo"]  # and is not cut to 0 either
    assert found[14]["qk"] == pytest.approx(MIN_LR) or style == "inverse-square-root"
