"""The search, on losses that are known functions of the rates."""

import math
from dataclasses import replace

import pytest

from blockwise_lr import BlockError, BlockType
from blockwise_lr.tuning import Search, Setting, report
from blockwise_lr.tuning.search import searched_blocks

BLOCKS = (BlockType.EMBEDDING, BlockType.QK, BlockType.FFN, BlockType.NORM)
BEST = (12.0, 5.0, 3.0, 6.0)  # log2 of the best rate of each block type, over 1e-4


def loss(setting, best=BEST, noise=0.0):
    """A bowl over the logarithms of the block types' rates; too high a rate of the FFN diverges."""
    rates = [math.log2(setting.lr * ratio / 1e-4) for ratio in setting.ratios]
    if rates[2] > best[2] + 2.5:
        return math.inf
    wobble = noise * math.sin(1e3 * sum(rates) + 77 * setting.seed)
    return 3 + sum(0.01 * (rate - at) ** 2 for rate, at in zip(rates, best)) + wobble


def carried_out(search, of=loss, stop_after=10_000):
    losses = {}
    while len(losses) < stop_after:
        wanted = search.next_runs(losses)
        if not wanted:
            break
        assert not set(wanted) & set(losses) and len(set(wanted)) == len(wanted)
        losses[wanted[0]] = of(wanted[0])
    return losses


@pytest.mark.parametrize("start", ["paper", "uniform", {"embedding": 4}])
def test_it_ends_within_a_factor_of_two_of_the_best(start):
    search = Search(1e-3, BLOCKS, start, seeds=2, trials=500)
    losses = carried_out(search)
    found = search.found(losses)
    rates = [math.log2(found.best.lr * ratio / 1e-4) for ratio in found.best.ratios]
    assert all(abs(rate - at) <= 0.5 + 1e-9 for rate, at in zip(rates, BEST))
    grid = {setting.lr: value for setting, value in losses.items() if set(setting.ratios) == {1.0} and not setting.seed}
    best = min(grid, key=grid.get)
    assert best == found.adamw.lr and {best / 2, best * 2} <= {float(lr) for lr in grid}
    assert found.gains == (pytest.approx(loss(found.adamw) - loss(found.best)),)


def test_runs_of_adamw_have_one_rate_whatever_is_searched():
    search = Search(1e-3, (BlockType.EMBEDDING, BlockType.QK), "paper", seeds=2, trials=100)
    losses = carried_out(
        search, lambda setting: 3 + abs(math.log2(setting.lr / 1e-3)) / 10 + abs(setting.ratios[0] - 8) / 100
    )
    adamw = search.found(losses).adamw
    assert search.ratios(adamw) == dict.fromkeys(("embedding", "qk", "vo", "ffn", "norm"), 1.0)
    others = {tuple(search.ratios(setting)[block] for block in ("vo", "ffn", "norm")) for setting in losses}
    assert others == {(1.0, 1.0, 1.0), (4.0, 6.0, 1.0)}  # AdamW's, and the paper's, which are not searched


def test_it_goes_on_from_any_point_to_the_same_end():
    search = Search(1e-3, BLOCKS, "paper", seeds=3, trials=60)
    whole = carried_out(search)
    for cut in (1, 5, 17, 40):
        losses = carried_out(search, stop_after=cut)
        while wanted := search.next_runs(losses):
            losses |= {setting: loss(setting) for setting in wanted}  # side by side from here
        assert search.found(losses).best == search.found(whole).best


def test_trials_are_kept_and_seeds_are_among_them():
    for trials in (12, 13, 25):
        search = Search(1e-3, BLOCKS, "paper", seeds=2, trials=trials)
        losses = carried_out(search)
        assert trials - 1 <= len(losses) <= trials and sum(setting.seed for setting in losses) == 2
        assert len(search.found(losses).gains) == 1
    few = Search(1e-3, BLOCKS, "paper", seeds=2, trials=7)  # AdamW's rates alone: nothing to compare with other seeds
    losses = carried_out(few)
    assert few.found(losses).best == few.found(losses).adamw and all(setting.seed == 0 for setting in losses)


def test_rates_that_diverge_lead_downwards():
    losses = carried_out(Search(1.0, BLOCKS, "paper", seeds=1, trials=200))
    assert math.isinf(losses[Setting(1.0, (1.0,) * 5)]) and min(losses.values()) < 3.1
    with pytest.raises(BlockError, match="no best learning rate or ratio was found"):
        carried_out(Search(1.0, BLOCKS, "paper", seeds=1, trials=200), of=lambda setting: math.inf)


@pytest.mark.parametrize(
    "trials, best, words",
    [
        (7, 8.0, ["ended before AdamW's best rate was found", "begin at --lr"]),
        (7, 0.0, ["ended before any ratios were tried", "more --trials"]),
        (60, 0.0, ["Nothing tried is better than one learning rate"]),
    ],
)
def test_a_search_that_was_too_short_says_so_and_judges_no_ratios(trials, best, words, tmp_path):
    """The best rate is ``best`` factors of 2 above where the search starts."""
    search = Search(1e-3, BLOCKS, "uniform", seeds=3, trials=trials)
    losses = carried_out(
        search,
        lambda setting: (
            3 + abs(math.log2(setting.lr / 1e-3) - best) / 10 + sum(abs(math.log2(ratio)) for ratio in setting.ratios)
        ),
    )
    said = report.verdict(search, losses)
    assert all(word in said for word in words) and search.has_other_ratios(losses) == (trials == 60)
    report.draw(search, losses, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_a_move_must_improve_by_the_margin():
    flat = (12.0, 12.0, 12.0, 12.0)
    near = replace(Search(1e-4 * 2**12, BLOCKS, "uniform", seeds=1, trials=200), margin=0.0)

    def of(setting):
        return loss(setting, (12.0, 12.0, 12.0, 12.6))

    assert near.found(carried_out(near, of)).best.ratios != (1.0,) * 5
    far = replace(near, margin=0.005)
    losses = carried_out(far, of)
    assert len(losses) < 3 + 2 * 5 + 1 and loss(Setting(1e-4 * 2**12, (1.0,) * 5), flat) == 3


def test_the_gain_is_over_further_seeds_only():
    search = Search(1e-3, BLOCKS, "paper", seeds=4, trials=100)
    losses = carried_out(search, lambda setting: loss(setting, noise=0.05))
    found = search.found(losses)
    wanted = [losses[replace(found.adamw, seed=seed)] - losses[replace(found.best, seed=seed)] for seed in (1, 2, 3)]
    mean, half = found.gain
    assert found.gains == pytest.approx(wanted) and mean == pytest.approx(sum(wanted) / 3)
    deviation = math.sqrt(sum((gain - mean) ** 2 for gain in wanted) / 2)
    assert half == pytest.approx(4.303 * deviation / math.sqrt(3))


def test_bad_settings_are_refused():
    for arguments, words in (
        ((0.0, BLOCKS), "--lr is 0.0"),
        ((math.inf, BLOCKS), "--lr is inf"),
        ((1e-3, ()), "one block type"),
        ((1e-3, BLOCKS, "paper", 3, 6), "7 trials"),
    ):
        with pytest.raises(BlockError, match=words):
            Search(*arguments)
    assert searched_blocks(["qk", "ffn", "qk"]) == (BlockType.QK, BlockType.FFN)
    with pytest.raises(BlockError, match="--blocks names kq; block types are embedding"):
        searched_blocks(["kq", "ffn"])
