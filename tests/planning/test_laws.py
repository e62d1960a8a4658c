"""Budgets, published laws, and the fit of a size law to runs."""

import csv
import math
from collections import defaultdict
from pathlib import Path

import pytest

from blockwise_lr.blocks import BlockError
from blockwise_lr.planning import LAWS, allocate, fit_optima
from blockwise_lr.planning.laws import FITTED_FLOPS, optimum, optimum_range
from blockwise_lr.planning.recipe import recipe

# numbers of arXiv 2406.19146's repository (formll/resolving-scaling-law-discrepancies at 0dc60d9, MIT): losses at equal
# compute, and the exponents that its summaries keep
RUNS = Path(__file__).with_name("isoflop.csv")
EXPONENTS = {
    "rw-base-long-kaplan-kaplan": 0.8353,
    "rw-base-long-kaplan-standard": 0.70647,
    "rw-base-short-kaplan-standard": 0.60204,
    "rw-base-short-chinchilla-standard": 0.57149,
    "rw-tuned-short-const-standard": 0.4969,
    "rw-base-long-kaplan-attention": 0.71706,
    "rw-base-short-kaplan-attention": 0.62225,
    "rw-base-short-chinchilla-attention": 0.57719,
    "rw-tuned-short-const-attention": 0.50527,
    "rw-tuned-long-const-kaplan": 0.71149,
    "owt2-base-long-kaplan-kaplan": 0.86351,
    "owt2-base-long-kaplan-standard": 0.6985,
    "owt2-base-short-kaplan-standard": 0.6032,
    "owt2-base-short-chinchilla-standard": 0.5743,
    "owt2-tuned-short-const-standard": 0.51845,
}
# its table of tuned runs: parameters with the output layer, learning rate, batch in sequences of 2048
TUNED = [(5.2e6, 13e-3, 20), (28.7e6, 7.4e-3, 64), (108e6, 4.7e-3, 160), (347e6, 3.2e-3, 320), (902e6, 2.4e-3, 640)]


@pytest.fixture(scope="module")
def series():
    found = defaultdict(list)
    with RUNS.open(newline="") as lines:
        for row in csv.DictReader(lines):
            found[row["series"]].append((float(row["flops"]), float(row["parameters"]), float(row["loss"])))
    return found


@pytest.mark.parametrize("name", EXPONENTS)
def test_the_fit_gives_the_exponents_that_its_authors_keep(series, name):
    law = fit_optima(series[name])
    assert law.exponent == pytest.approx(
        EXPONENTS[name], abs=0.01 if name != "rw-tuned-short-const-standard" else 0.002
    )
    assert len(law.optima) >= 10


def test_a_law_without_noise_is_found_exactly():
    runs = [
        (flops, size, 2.0 + 0.05 * math.log(size / (0.2 * flops**0.5)) ** 2)
        for flops in (1e17, 1e18, 1e19, 1e20)
        for size in (0.2 * flops**0.5 * 2 ** (k / 4) for k in range(-9, 10))
    ]
    law = fit_optima(runs)
    assert law.exponent == pytest.approx(0.5, abs=1e-3) and law.parameters(1e18) == pytest.approx(0.2e9, rel=0.02)


def test_runs_whose_best_is_at_an_end_give_no_law():
    falling = [(flops, size, 3 - math.log(size) / 10) for flops in (1e17, 1e18) for size in (1e6, 2e6, 4e6)]
    with pytest.raises(BlockError, match="at 0 of 2 budgets"):
        fit_optima(falling)


def test_any_two_of_three_and_any_one_belong_together():
    whole = allocate(flops=1e20, parameters=1e9)
    assert whole.tokens == pytest.approx(1e20 / 6e9)
    assert allocate(parameters=1e9, tokens=whole.tokens).flops == pytest.approx(1e20)
    assert allocate(flops=1e20, tokens=whole.tokens).parameters == pytest.approx(1e9)
    best = allocate(flops=1e20)
    for one in ({"parameters": best.parameters}, {"tokens": best.tokens}):
        same = allocate(**one)
        assert (same.flops, same.parameters, same.tokens) == pytest.approx((1e20, best.parameters, best.tokens))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "none of"),
        ({"flops": 1e20, "parameters": 1e9, "tokens": 1e10}, "all three"),
        ({"flops": -1}, "flops is -1"),
        ({"tokens": math.inf}, "tokens is inf"),
    ],
)
def test_other_budgets_are_refused(given, said):
    with pytest.raises(BlockError, match=said):
        allocate(**given)


def test_the_size_law_gives_the_published_points():
    # arXiv 2406.19146's tuned law: tokens per parameter at 1e18, 1e20, and size and tokens at Chinchilla's budget
    assert optimum(1e18).tokens_per_parameter == pytest.approx(15.3, abs=0.3)
    assert optimum(1e20).tokens_per_parameter == pytest.approx(15.7, abs=0.3)
    large = optimum(5.88e23)
    assert large.parameters == pytest.approx(77e9, rel=0.03) and large.tokens == pytest.approx(1.27e12, rel=0.03)
    assert large.outside == pytest.approx(5.88e23 / FITTED_FLOPS[1]) and optimum(1e18).outside == 1
    low, high = optimum_range(5.88e23)
    inside = optimum_range(5.7e17)
    assert low < large.parameters < high and high / low > inside[1] / inside[0] > 1.5


@pytest.mark.parametrize(("parameters", "lr", "batch"), TUNED)
def test_rate_and_batch_follow_the_runs_they_were_tuned_in(parameters, lr, batch):
    made = recipe(allocate(parameters=parameters, tokens=20 * parameters))
    assert made.adamw_lr == pytest.approx(lr, rel=0.12) and made.sequences == pytest.approx(batch, rel=0.17)
    assert not LAWS[0].is_extrapolated(made.budget)


def test_other_laws_by_their_formulas_at_a_billion_parameters():
    budget = allocate(parameters=1e9, tokens=1e11)
    step, deepseek, bjorck = LAWS[1:]
    assert step.lr(budget, 1e9) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert step.batch(budget, 1e9) == pytest.approx(1.1e6, rel=0.02)
    assert deepseek.lr(budget, 1e9) == pytest.approx(0.3118 * 6e20**-0.125)
    assert bjorck.lr(budget, 1e9) == pytest.approx(1.55e-3 * 100**-0.32) and bjorck.batch is None
    assert not step.is_extrapolated(budget) and deepseek.is_extrapolated(budget)


def test_a_recipe_divides_over_the_ranks_and_its_warmup_ends():
    made = recipe(allocate(parameters=1e9, tokens=2e10), ranks=48, length=1024)
    assert made.sequences % 48 == 0 and made.steps == round(2e10 / made.batch)
    assert made.warmup_steps == pytest.approx(1e9 / made.batch, rel=0.01)
    assert (
        recipe(allocate(parameters=1e9, tokens=2e9)).warmup_steps
        <= recipe(allocate(parameters=1e9, tokens=2e9)).steps / 10
    )
    assert made.base_lr("paper") == pytest.approx(made.adamw_lr / 6) and made.base_lr("embedding") == made.adamw_lr
    assert recipe(allocate(parameters=1e9, tokens=2e10), batch=2**20, length=2048).batch == 2**20
    with pytest.raises(BlockError, match="ranks is 0"):
        recipe(allocate(flops=1e18), ranks=0)
