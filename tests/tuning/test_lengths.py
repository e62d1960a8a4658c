"""`blockwise-lr tune-seqlen`: the search as a function of its runs, and the command with a script."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockwise_lr import BlockError
from blockwise_lr.cli import app
from blockwise_lr.tuning.lengths import VALIDATION, LengthSearch

SCRIPT = Path(__file__).with_name("growth.py")
CALM, LOUD = (3.0, 2.9, 3.1), (3.0, 2.9, 2.9 + math.log(1.31))


def searched(search, is_calm):
    runs = {}
    while (lengths := search.next_run(runs)) is not None:
        assert lengths not in runs and len(runs) < 40
        runs[lengths] = CALM if is_calm(lengths) else LOUD
    return runs


@pytest.mark.parametrize("start, steps", [(8, 100), (8, 3000), (8, 137), (32, 700), (512, 2999), (64, 1)])
def test_it_finds_the_smallest_start_and_the_most_steps(start, steps):
    search = LengthSearch(1024, 8, min(steps, 100), 3000, precision=0.01)
    runs = searched(search, lambda lengths: lengths.start >= start and lengths.steps <= steps)
    found = search.found(runs)
    assert found.start == start and steps - max(1, 0.01 * steps) <= found.steps <= steps
    assert max(lengths.steps for lengths in runs) <= 3000 and len(runs) <= 8 + 6 + 8


def test_where_no_start_is_calm_it_ends_with_none():
    search = LengthSearch(100, 8, 10, 1000)
    runs = searched(search, lambda lengths: False)
    assert [lengths.start for lengths in runs] == [8, 16, 32, 64] and search.found(runs) is None


def test_calm_is_by_perplexity_over_the_best_so_far():
    search = LengthSearch(64, 8, 10, 100)
    assert search.is_calm((5.0, 3.0, 3.0 + math.log(1.29))) and not search.is_calm((5.0, 3.0, 3.0 + math.log(1.31)))
    assert search.is_calm((5.0, 5.2)) and not search.is_calm((5.0, math.inf)) and not search.is_calm((math.inf,))
    assert search.worst((5.0, 3.0, 3.1)) == pytest.approx(math.exp(0.1))


@pytest.mark.parametrize(
    "line, loss",
    [
        (" validation loss at iteration 1000 | lm loss value: 3.214500E+00 | lm loss PPL: 2.489074E+01 | ", 3.2145),
        ("step 12  loss 9.1  validation loss 3.25", 3.25),
        ("{'eval_loss': 3.5, 'eval_runtime': 1.2, 'epoch': 0.1}", 3.5),
        ("iter 10: train loss 4.01, val loss 3.75", 3.75),
        ("val_loss=nan", math.nan),
        ("step 12  loss 9.1", None),
    ],
)
def test_validation_losses_are_read_as_programs_print_them(line, loss):
    found = [float(match["loss"]) for match in re.finditer(VALIDATION, line, re.IGNORECASE)]
    assert found == pytest.approx([] if loss is None else [loss], nan_ok=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"first": 64}, "--first is 64"),
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 101}, "--most is 100"),
        ({"fluctuation": 1.0}, "--fluctuation is above 1"),
    ],
)
def test_bad_settings_are_told(changes, words):
    with pytest.raises(BlockError, match=words):
        LengthSearch(**{"end": 64, "first": 8, "steps": 10, "most": 100, **changes})


def tune(out, *options, command=("--start", "{start}", "--steps", "{steps}")):
    words = ["tune-seqlen", "--out", out, "--end", 1024, "--steps", 100, "--most", 3000, *options]
    return CliRunner(env={"COLUMNS": "120"}).invoke(
        app, [*map(str, words), "--", sys.executable, str(SCRIPT), *command]
    )


def test_the_command_finds_it_draws_it_and_goes_on(tmp_path):
    first = tune(tmp_path, "--precision", 0.5, "--json")
    assert first.exit_code == 0, first.output
    rough = json.loads(first.stdout)["found"]
    assert rough["start"] == 32 and 350 <= rough["steps"] <= 700
    logs = {file: file.read_text() for file in tmp_path.glob("run-*/log")}
    diverged = json.loads((tmp_path / "run-8-100" / "losses.json").read_text())["losses"]
    assert len(diverged) == 4 and "step 5" not in logs[tmp_path / "run-8-100" / "log"]  # ended where it jumped
    shown = tune(tmp_path, "--precision", 0.02)
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "result.json").read_text())["found"]
    assert found["start"] == 32 and 680 <= found["steps"] <= 700
    assert all(file.read_text() == text for file, text in logs.items())  # not run again
    assert f"--sequence-length-warmup-start 32 --sequence-length-warmup-steps {found['steps']}" in shown.output
    assert f'"sequence_length_warmup": {json.dumps(found)}' in shown.output
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    other = tune(tmp_path, "--fluctuation", 1.5)
    assert other.exit_code == 2 and "another command or search" in other.output


def test_a_ds_config_is_filled(tmp_path):
    base = tmp_path / "base.json"
    base.write_text(json.dumps({"fp16": {}, "sequence_length_warmup": {"pacing": "root"}}))
    done = tune(tmp_path / "out", "--ds-config", base, "--json", command=("--ds-config", "{ds_config}"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["found"]["start"] == 32
    config = json.loads((tmp_path / "out" / "run-8-100" / "ds_config.json").read_text())
    wanted = {"pacing": "root", "start": 8, "end": 1024, "steps": 100}
    assert config == {"fp16": {}, "sequence_length_warmup": wanted}


@pytest.mark.parametrize(
    "options, command, words",
    [
        ((), ("--start", "{start}"), "write {start} and {steps}"),
        ((), ("--ds-config", "{ds_config}"), "go together"),
        (("--loss", "("), ("{start}", "{steps}"), "no regular expression"),
        (("--loss", "loss"), ("{start}", "{steps}"), "needs the group"),
        ((), ("--start", "{start}", "--steps", "{steps}", "--once"), "printed 1 validation losses"),
        ((), ("--start", "{start}", "--steps", "{steps}", "--unknown"), "ended with exit code 2"),
    ],
)
def test_what_cannot_be_searched_is_told(tmp_path, options, command, words):
    done = tune(tmp_path, *options, command=command)
    assert done.exit_code == 2 and words in done.output


def test_a_search_without_a_calm_run_says_what_to_change(tmp_path):
    done = tune(tmp_path, command=("--start", "{start}", "--steps", "{steps}", "--never"))
    assert done.exit_code == 0 and "lower the learning rate" in " ".join(done.output.split())
    assert json.loads((tmp_path / "result.json").read_text())["found"] is None
