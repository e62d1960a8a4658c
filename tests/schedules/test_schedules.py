"""Every schedule at every step, for every block type, and resumed at every step, against its closed form."""

import pytest
import torch
from schedules.closed_forms import constant, fall, infinite, inverse_sqrt, official_wsd, up, warmup_then, wsd
from twins import RATIOS, make

from blockwise_lr import BlockError, BlockwiseAdamW, BlockwiseLion, map_blocks, schedules
from blockwise_lr.schedules import SCHEDULES, BlockwiseInfinite, BlockwiseRewarm, BlockwiseWarmupCosine, BlockwiseWSD

LR, LOW, WARMUP, TOTAL = 1e-3, 2e-5, 5, 24
DEFAULTS = {"lr": LR, "min_lr": LOW, "block_lr_ratios": "paper"}


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture(scope="module")
def block_map(model):
    return map_blocks(model)


@pytest.fixture
def optimizer(model, block_map):
    def made(kind=BlockwiseAdamW, **options):
        return kind(model.named_parameters(), **{**DEFAULTS, "block_map": block_map, **options})

    return made


CASES = {
    "cosine": ("BlockwiseWarmupCosine", {"total_num_steps": TOTAL}, warmup_then("cosine")),
    "linear": ("BlockwiseWarmupLinear", {"total_num_steps": TOTAL}, warmup_then("linear")),
    "constant": ("BlockwiseWarmupConstant", {}, constant),
    "inverse sqrt": ("BlockwiseWarmupInverseSqrt", {}, inverse_sqrt),
    "wsd": ("BlockwiseWSD", {"total_num_steps": TOTAL}, wsd("linear", TOTAL / 3)),
    "wsd cosine": (
        "BlockwiseWSD",
        {"total_num_steps": TOTAL, "decay_num_steps": 7, "decay_style": "cosine"},
        wsd("cosine", 7),
    ),
    "wsd sqrt": (
        "BlockwiseWSD",
        {"total_num_steps": TOTAL, "decay_num_steps": 7, "decay_style": "minus_sqrt"},
        wsd("minus_sqrt", 7),
    ),
    "wsd exponential": (
        "BlockwiseWSD",
        {"total_num_steps": TOTAL, "decay_num_steps": 7, "decay_style": "exponential"},
        wsd("exponential", 7),
    ),
    "wsd meeting": ("BlockwiseWSD", {"total_num_steps": TOTAL, "meet_lr": "lr"}, official_wsd),
    "infinite": ("BlockwiseInfinite", {"cooldown_num_steps": 8, "constant_factor": 0.4}, infinite("cosine", 8, 0.4)),
    "infinite sqrt": (
        "BlockwiseInfinite",
        {"cooldown_num_steps": 8, "constant_factor": 0.4, "cooldown_style": "inverse_sqrt"},
        infinite("inverse_sqrt", 8, 0.4),
    ),
    "infinite annealed": (
        "BlockwiseInfinite",
        {"cooldown_num_steps": 4, "constant_factor": 0.5, "anneal_begin_num_steps": 15, "anneal_num_steps": 6},
        infinite("cosine", 4, 0.5, anneal=(15, 6)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_block_type_also_when_it_resumes_there(case, optimizer):
    name, settings, closed = CASES[case]
    settings = {"warmup_num_steps": WARMUP, **settings}
    ours = optimizer()
    schedule = SCHEDULES[name](ours, **settings)
    for step in range(1, TOTAL + 3):
        wanted = {block: closed(step, r * LR, LR, LOW, WARMUP, TOTAL) for block, r in RATIOS.items()}
        assert {b: lr for b, lr in ours.block_lrs()[0].items() if b in RATIOS} == pytest.approx(wanted, rel=1e-12)
        assert ours.param_groups[0]["lr"] == pytest.approx(closed(step, LR, LR, LOW, WARMUP, TOTAL), rel=1e-12)
        saved = schedule.state_dict()
        ours = optimizer()
        schedule = SCHEDULES[name](ours, **settings)
        schedule.load_state_dict(saved)
        schedule.step()


@pytest.mark.parametrize("case", CASES)
def test_tokens_count_as_steps_do_where_all_steps_have_as_many(case, optimizer):
    name, settings, _ = CASES[case]
    settings = {"warmup_num_steps": WARMUP, **settings}
    in_tokens = {key: value * 512 if key.endswith("num_steps") else value for key, value in settings.items()}
    plain, counted = optimizer(), optimizer()
    steps, tokens = SCHEDULES[name](plain, **settings), SCHEDULES[name](counted, **in_tokens, tokens_per_step=512)
    for number in range(TOTAL):
        assert counted.block_lrs()[0] == pytest.approx(plain.block_lrs()[0], rel=1e-12)
        steps.step()
        tokens.step(tokens=512 if number % 2 else None)
    assert tokens.tokens == 512 * TOTAL


def test_the_tokens_of_short_steps_are_few(optimizer):
    ours = optimizer()
    schedule = SCHEDULES["BlockwiseWarmupLinear"](ours, 1000, 0, tokens_per_step=100)
    for tokens, at in ((20, 40), (30, 80), (100, 250)):  # the next step is taken to be as long as the last
        schedule.step(tokens=tokens)
        assert ours.param_groups[0]["lr"] == pytest.approx(LR + (LOW - LR) * at / 1000)
    fresh = optimizer()
    again = SCHEDULES["BlockwiseWarmupLinear"](fresh, 1000, 0, tokens_per_step=100)
    again.load_state_dict(schedule.state_dict())
    assert again.tokens == 150 and again.last_batch_iteration == 2


def test_tokens_are_counted_in_a_chain_of_torchs_schedulers(optimizer):
    ours = optimizer()
    schedule = SCHEDULES["BlockwiseWarmupLinear"](ours, 1000, 0, tokens_per_step=100)
    first = torch.optim.lr_scheduler.ConstantLR(ours, factor=0.5)
    chain = torch.optim.lr_scheduler.SequentialLR(ours, [first, schedule], milestones=[3])
    stepped(ours, chain, 3)
    for at in (100, 200, 300):
        assert ours.param_groups[0]["lr"] == pytest.approx(LR + (LOW - LR) * at / 1000)
        stepped(ours, chain, 1)


# ---- what changes between block types and over time


def test_along_one_slope_higher_peaks_take_longer(optimizer):
    ours = optimizer()
    schedule = SCHEDULES["BlockwiseWarmupLinear"](ours, 60, 2, block_warmup="same_slope")
    for step in range(1, 61):
        for block, ratio in RATIOS.items():
            wanted = warmup_then("linear")(step, ratio * LR, LR, LOW, 2 * ratio, 60)
            assert ours.block_lrs()[0][block] == pytest.approx(wanted, rel=1e-12)
            assert step > 2 * ratio or ours.block_lrs()[0][block] == pytest.approx(LR / 2 * step)
        schedule.step()


def test_a_block_type_has_a_warmup_of_its_own(optimizer):
    ours = optimizer()
    schedule = BlockwiseWarmupCosine(ours, TOTAL, 4, block_warmup={"qk": 3, "norm": 0})
    for step in range(1, TOTAL + 1):
        for block, ratio in RATIOS.items():
            warmup = {"qk": 12, "norm": 0}.get(block, 4)
            wanted = warmup_then("cosine")(step, ratio * LR, LR, LOW, warmup, TOTAL)
            assert ours.block_lrs()[0][block] == pytest.approx(wanted, rel=1e-12)
        schedule.step()


def test_ratios_that_change_over_time(optimizer):
    ours = optimizer()
    settings = {
        "start_ratios": {"qk": 1},
        "start_ratio_num_steps": 8,
        "end_ratios": "uniform",
        "end_ratio_num_steps": 6,
    }
    schedule = BlockwiseWarmupCosine(ours, TOTAL, WARMUP, **settings)
    for step in range(1, TOTAL + 1):
        for block, ratio in RATIOS.items():
            now = 1 + (8 - 1) * min(step / 8, 1) if block == "qk" else ratio
            now = now + (1 - now) * max(step - 18, 0) / 6
            wanted = warmup_then("cosine")(step, now * LR, LR, LOW, WARMUP, TOTAL)
            assert ours.block_lrs()[0][block] == pytest.approx(wanted, rel=1e-12)
        schedule.step()
    assert set(ours.block_lrs()[0].values()) == {ours.param_groups[0]["lr"]}


@pytest.mark.parametrize("beta2, steps", [(0.95, 40), (0.98, 100), (0.99, 200), (0.999, 2000)])
def test_auto_is_the_untuned_warmup(beta2, steps, optimizer):
    schedule = SCHEDULES["BlockwiseWarmupConstant"](optimizer(betas=(0.9, beta2)), "auto")
    assert schedule.curve.warmup_num_steps == steps


def test_the_floor_of_wsd_is_a_tenth_and_of_the_others_a_twentieth(optimizer):
    assert BlockwiseWSD(optimizer(min_lr=None), TOTAL).min_lrs == [LR / 10]
    assert BlockwiseWarmupCosine(optimizer(min_lr=None), TOTAL).min_lrs == [LR / 20]


def test_lion_and_plain_optimizers_have_them(optimizer):
    lion = optimizer(BlockwiseLion)
    BlockwiseWSD(lion, TOTAL, WARMUP, meet_lr="lr")
    assert lion.block_lrs()[0]["qk"] == pytest.approx(8 * LR / WARMUP)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=LR)
    schedule, seen = BlockwiseWSD(plain, TOTAL, WARMUP), []
    for _ in range(TOTAL):
        seen.append(plain.param_groups[0]["lr"])
        schedule.step()
    assert seen == pytest.approx([wsd("linear", 8)(t, LR, LR, LR / 10, WARMUP, TOTAL) for t in range(1, TOTAL + 1)])


# ---- training on


def stepped(ours, schedule, steps):
    for p in ours.all_tensors():
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        ours.step()
        schedule.step()


def rewarmed(step, block, starts, begin, warmup=4, total=12):
    t, p = step - begin, RATIOS[block] * LR
    return (
        up(t, p, warmup, starts[block])
        if t <= warmup
        else fall("cosine", p, LOW, min((t - warmup) / (total - warmup), 1))
    )


@pytest.mark.parametrize("done", [24, 10])  # at the end of its schedule, where all rates are one, and in the middle
def test_rewarming_begins_at_the_rates_of_the_checkpoint_and_resumes(done, optimizer):
    first = optimizer()
    schedule = BlockwiseWarmupCosine(first, TOTAL, WARMUP)
    stepped(first, schedule, done)
    starts, saved, state = first.block_lrs()[0], schedule.state_dict(), first.state_dict()
    ours = optimizer()
    again = BlockwiseRewarm(ours, 12, 4, begin_num_steps=done)
    ours.load_state_dict(state)
    again.load_state_dict(saved)
    for step in range(done + 1, done + 14):
        wanted = {block: rewarmed(step, block, starts, done) for block in RATIOS}
        assert {b: ours.block_lrs()[0][b] for b in RATIOS} == pytest.approx(wanted, rel=1e-12), step
        position = again.state_dict()
        ours = optimizer()
        again = BlockwiseRewarm(ours, 12, 4, begin_num_steps=done)
        again.load_state_dict(position)
        again.step()


def test_rewarming_a_second_time_begins_where_the_first_has_ended(optimizer):
    ours = optimizer()
    first = BlockwiseRewarm(ours, 12, 4)  # of a fresh optimizer: from 0
    assert ours.block_lrs()[0]["ffn"] == pytest.approx(6 * LR / 4)
    stepped(ours, first, 12)
    fresh = optimizer()
    second = BlockwiseRewarm(fresh, 12, 4, begin_num_steps=12)
    second.load_state_dict(first.state_dict())
    assert fresh.block_lrs()[0]["ffn"] == pytest.approx(LOW + (6 * LR - LOW) / 4)


def test_a_loaded_optimizer_alone_tells_where_rewarming_begins(optimizer):
    first = optimizer()
    stepped(first, BlockwiseWarmupCosine(first, TOTAL, WARMUP), TOTAL)
    ours = optimizer()
    ours.load_state_dict(first.state_dict())
    BlockwiseRewarm(ours, 12, 4)
    assert ours.block_lrs()[0]["qk"] == pytest.approx(LOW + (8 * LR - LOW) / 4)
    later = optimizer()
    schedule = BlockwiseRewarm(later, 12, 4)
    later.load_state_dict(first.state_dict())  # as DeepSpeed does with load_lr_scheduler_states=False
    assert later.block_lrs() == ours.block_lrs() and schedule.start_lrs[0]["qk"] == pytest.approx(LOW)


@pytest.mark.parametrize("start, first", [(0, 0.0), (3e-5, 3e-5), ({"qk": 1e-4}, 1e-4)])
def test_rewarming_from_a_rate_that_is_given(start, first, optimizer):
    ours = optimizer()
    BlockwiseRewarm(ours, 12, 4, start_lr=start)
    assert ours.block_lrs()[0]["qk"] == pytest.approx(first + (8 * LR - first) / 4)


def test_rewarming_needs_to_know_the_rates(optimizer):
    old = {"last_batch_iteration": 9, "total_num_steps": 10, "warmup_num_steps": 2, "peaks": [LR], "min_lrs": [LOW]}
    with pytest.raises(BlockError, match="does not hold its learning rates .* give start_lr"):
        BlockwiseRewarm(optimizer(), 12, 4, begin_num_steps=10).load_state_dict(old)
    with pytest.raises(BlockError, match='has done 10 steps and begin_num_steps is 20; write "begin_num_steps": 10'):
        BlockwiseRewarm(optimizer(), 12, 4, begin_num_steps=20).load_state_dict(old)


def test_an_anneal_on_demand_goes_on_after_a_resume_and_is_forgotten_by_the_checkpoint_before_it(optimizer):
    def started():
        ours = optimizer()
        return ours, BlockwiseInfinite(ours, warmup_num_steps=5, cooldown_num_steps=4, constant_factor=0.5)

    ours, schedule = started()
    stepped(ours, schedule, 15)
    before = schedule.state_dict()
    schedule.anneal(6)
    closed = infinite("cosine", 4, 0.5, anneal=(15, 6))
    for step in range(16, 24):
        wanted = {block: closed(step, r * LR, LR, LOW, 5, None) for block, r in RATIOS.items()}
        assert {b: ours.block_lrs()[0][b] for b in RATIOS} == pytest.approx(wanted, rel=1e-12)
        saved = schedule.state_dict()
        ours, schedule = started()
        schedule.load_state_dict(saved)
        schedule.step()
    ours, schedule = started()
    schedule.load_state_dict(before)
    stepped(ours, schedule, 30)
    assert ours.block_lrs()[0]["qk"] == pytest.approx(0.5 * 8 * LR)


# ---- what is refused


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("BlockwiseWSD", {"total_num_steps": 10, "decay_num_steps": 11}, "decay in fewer steps"),
        ("BlockwiseWSD", {"total_num_steps": 30, "warmup_num_steps": 11, "meet_lr": "lr"}, "there are 10 steps for it"),
        (
            "BlockwiseWSD",
            {"total_num_steps": 30, "warmup_num_steps": 5, "block_warmup": "same_slope"},
            "that of embedding is 50, and there are 20 steps",
        ),
        (
            "BlockwiseWSD",
            {"total_num_steps": 30, "decay_style": "sqrt"},
            "use one of linear, cosine, minus_sqrt, exponential",
        ),
        (
            "BlockwiseWSD",
            {"total_num_steps": 30, "decay_style": "exponential", "min_lr": 0},
            "min_lr is 0, which it never",
        ),
        ("BlockwiseWSD", {"total_num_steps": 30, "meet_lr": "base"}, "meet_lr is 'base'"),
        ("BlockwiseWarmupLinear", {"total_num_steps": 30, "warmup_num_steps": "40"}, "whole number of optimizer steps"),
        ("BlockwiseWarmupLinear", {"total_num_steps": 30, "start_ratios": "uniform"}, "give both, or neither"),
        ("BlockwiseWarmupLinear", {"total_num_steps": 30, "block_warmup": {"kv": 2}}, "unknown block type 'kv'"),
        ("BlockwiseWarmupConstant", {"end_ratios": "uniform", "end_ratio_num_steps": 3}, "needs a schedule that ends"),
        ("BlockwiseInfinite", {"cooldown_num_steps": 3, "constant_factor": 1.5}, "above 0, up to 1"),
        (
            "BlockwiseInfinite",
            {"cooldown_num_steps": 3, "constant_factor": 0.5, "anneal_num_steps": 3},
            "give both, or",
        ),
    ],
)
def test_settings_that_cannot_be_meant(name, settings, words, optimizer):
    with pytest.raises(BlockError, match=words):
        SCHEDULES[name](optimizer(), **settings)


@pytest.mark.parametrize("tokens, per_step", [(12, None), (-1, 10), (1.5, 10)])
def test_tokens_that_cannot_be_meant(tokens, per_step, optimizer):
    schedule = BlockwiseWarmupCosine(optimizer(), 1000, tokens_per_step=per_step)
    with pytest.raises(BlockError, match="give a whole number, and tokens_per_step"):
        schedule.step(tokens=tokens)


def test_auto_needs_betas():
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=LR)
    with pytest.raises(BlockError, match="the optimizer has no betas; give a number"):
        BlockwiseWarmupCosine(plain, 10, "auto")


def test_a_schedule_says_its_settings():
    assert all(getattr(schedules, name) is kind for name, kind in SCHEDULES.items())
    for kind in SCHEDULES.values():
        assert all(f"{setting}: " in kind.__doc__ for setting in kind.curve_type.model_fields)
