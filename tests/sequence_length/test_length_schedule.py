"""The lengths, beside DeepSpeed's own scheduler and counted by hand."""

import pytest

from blockwise_lr import BlockError
from blockwise_lr.sequence_length import LengthSchedule, WarmupOptions, layout_multiple


def schedule(needed=1, **options):
    return LengthSchedule(WarmupOptions.checked(options, "sequence_length_warmup: "), needed)


PAPER = dict(start=64, end=1024, steps=45000)


@pytest.mark.parametrize(
    "options, kind, settings",
    [
        (dict(start=8, end=112, steps=10, multiple=16), "fixed_linear", {}),
        (dict(start=64, end=1024, steps=450), "fixed_linear", {}),
        (dict(start=64, end=1024, steps=450, pacing="root"), "fixed_root", {"root_degree": 2}),
        (dict(start=80, end=2048, steps=1100, pacing="root", root_degree=3), "fixed_root", {"root_degree": 3}),
    ],
)
def test_lengths_are_those_of_deepspeeds_scheduler(options, kind, settings):
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    ours, last = schedule(**options), options["steps"] + 5
    theirs = CurriculumScheduler(
        {
            "min_difficulty": options["start"],
            "max_difficulty": options["end"],
            "schedule_type": kind,
            "schedule_config": {
                "total_curriculum_step": options["steps"],
                "difficulty_step": options.get("multiple", 8),
                **settings,
            },
        }
    )
    # older ones begin below the start where that is no multiple: here every start is one or is rounded up
    expected = [max(theirs.update_difficulty(step), ours.first) for step in range(1, last)]
    assert [ours.length(step) for step in range(1, last)] == expected


def test_the_papers_steps():
    ours = schedule(**PAPER)
    assert [ours.length(t) for t in (0, 1, 374, 375, 22500, 44999, 45000, 10**9)] == [
        64,
        64,
        64,
        72,
        544,
        1016,
        1024,
        1024,
    ]
    assert len(ours.changes) == 121 and "121 distinct lengths" in ours.describe()


PACINGS = [
    dict(start=64, end=1024, steps=450),
    dict(start=50, end=1000, steps=77, multiple=16),
    dict(start=8, end=512, steps=300, pacing="root", root_degree=3),
    dict(pacing="discrete", lengths=[64, 100, 256], until=[5, 9]),
    dict(start=16, end=128, steps=40, pacing=lambda step: 16 + step * step // 20),
]


@pytest.mark.parametrize("options", PACINGS)
def test_changes_and_tokens_are_those_counted_step_by_step(options):
    ours = schedule(**options)
    lengths = [ours.length(step) for step in range(1, 500)]
    assert lengths == sorted(lengths) and lengths[-1] == ours.full
    assert all(length % ours.multiple == 0 or length == ours.full for length in lengths)
    first = {}
    for step, length in enumerate(lengths, 1):
        first.setdefault(length, step)
    assert ours.changes == [(step, length) for length, step in first.items()]
    for steps in (0, 1, 7, 40, 300, 499):
        assert ours.tokens(steps, 3) == 3 * sum(lengths[:steps])
    for budget in (1, 1000, 12345, 60000):
        steps = ours.steps_for(budget, 3)
        assert ours.tokens(steps, 3) >= budget > ours.tokens(steps - 1, 3)


def test_lengths_are_multiples_of_what_the_layout_needs():
    needed, why = layout_multiple(context_parallel=2, tensor_parallel=3, sequence_parallel=True)
    assert needed == 12 and "2 x 6 ranks" in why
    assert layout_multiple(context_parallel=2, tensor_parallel=3)[0] == 4
    assert layout_multiple(tensor_parallel=3, sequence_parallel=True)[0] == 3
    assert layout_multiple(context_parallel=2, fp8="fp8")[0] == 32 and layout_multiple(fp8="mxfp8")[0] == 32
    assert layout_multiple() == (1, "")
    ours = schedule(needed, start=8, end=96, steps=50)
    assert ours.multiple == 24 and {ours.length(t) for t in range(1, 60)} == {24, 48, 72, 96}


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(PAPER, strat=3), "unknown parameter 'strat' (did you mean 'start'?)"),
        (dict(start=64, end=1024), "steps is not given"),
        (dict(PAPER, start=1024), "start is 1024 and end is 1024; start below the full length"),
        (dict(PAPER, start="64"), "start is '64'; give a whole number of tokens, 1 or above"),
        (dict(PAPER, steps=True), "steps is True; give a whole number of optimizer steps, 1 or above"),
        (dict(PAPER, pacing="cosine"), "pacing is 'cosine'; use one of linear, root, discrete"),
        (dict(PAPER, way="pack"), "way is 'pack'; use one of truncate, reshape"),
        (dict(PAPER, lengths=[3]), "lengths and until belong to pacing discrete"),
        (dict(PAPER, dims={"bias": 2}), "give the dimensions of the sequence by name"),
        (dict(pacing="discrete", lengths=[64, 32], until=[5]), "sequences never become shorter again"),
        (dict(pacing="discrete", lengths=[64, 128], until=[]), "2 lengths and 0 steps in until"),
        (dict(pacing="discrete", lengths=[64, 128], until=[3], start=3), "leave out start, end and steps"),
        (dict(start=60, end=64, steps=5), "rounded up to a multiple of 8, is 64 and the full one 64"),
        (dict(start=8, end=64, steps=5, pacing=lambda t: 64 - 8 * t), "48 at step 2 after 56; sequences never"),
        (dict(start=8, end=64, steps=5, pacing=lambda t: 8.0), "pacing returned 8.0 at step 1"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, words):
    with pytest.raises(BlockError) as error:
        schedule(**options)
    assert words in str(error.value)
