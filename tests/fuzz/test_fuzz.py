"""Random configurations over two ranks: one clear error on both, or a run that equals the unfused twin's; nothing else.

A few run with the suite; ``make fuzz`` runs 1,000 (``BLOCKWISE_LR_FUZZ`` says how many, ``BLOCKWISE_LR_FUZZ_SEED`` from
where)."""

import os

import pytest
from fuzz import runs
from fuzz.configs import draw
from ranks import pool

COUNT = int(os.environ.get("BLOCKWISE_LR_FUZZ", 16))
FIRST = int(os.environ.get("BLOCKWISE_LR_FUZZ_SEED", 0))
AT_ONCE = 8


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, AT_ONCE))
def test_random_configurations(first):
    configs = [draw(seed) for seed in range(first, min(first + AT_ONCE, FIRST + COUNT))]
    answers = pool(2).run(runs.outcomes, configs)
    wrong = {
        seed: (text, drawn)
        for seed, drawn, of_ranks in zip(range(first, first + AT_ONCE), configs, zip(*answers))
        if (text := runs.verdict(drawn, list(of_ranks))) is not None
    }
    assert not wrong, "\n".join(f"seed {seed}: {text}\n    {drawn}" for seed, (text, drawn) in wrong.items())
