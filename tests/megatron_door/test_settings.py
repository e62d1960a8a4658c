"""Values that Megatron users give, as flags, in a rules file or to register(): all pass the same checks, before any model."""

import argparse
import json
import subprocess
import sys
import types

import pytest

pytest.importorskip("megatron.core")

from blockwise_lr import BlockError
from blockwise_lr.megatron import BlockSettings, register, settings


@pytest.mark.parametrize(
    "values, words",
    [
        ({"block_strict": "false"}, ["block_strict is 'false'", "True or False"]),
        ({"block_strict": 0}, ["block_strict is 0", "True or False"]),
        ({"row_parallel_sums": None}, ["row_parallel_sums is None", "True or False"]),
        ({"block_lr_ratios": {"qk": "8"}}, ["block_lr_ratios['qk'] is '8'", "a finite number above 0"]),
        ({"block_lr_ratios": {"qk": True}}, ["block_lr_ratios['qk'] is True", "a finite number above 0"]),
        ({"block_lr_ratios": {"qk": -1}}, ["block_lr_ratios['qk'] is -1", "a finite number above 0"]),
        ({"block_lr_ratios": [("qk", 8)]}, ["block_lr_ratios must map block types to numbers"]),
        ({"block_weight_decay": {"norm": float("nan")}}, ["block_weight_decay['norm'] is nan", "0 or above"]),
        ({"block_rules": '[{"match": "*"}]'}, ["block_rules is '[{", "give a list of rules"]),
        (
            {"block_rules": [{"match": "*", "block": "ffn", "transposed": "false"}]},
            ["transposed is 'false'", "without quotes"],
        ),
        ({"kernel": "cuda"}, ["kernel is 'cuda'", "use one of auto, "]),
        ({"kernel": None}, ["kernel is None", "use one of auto, "]),
        ({"accept_mismatch": "block_ratios"}, ["accept_mismatch names 'block_ratios'", "block_lr_ratios"]),
        ({"accept_mismatch": 5}, ["accept_mismatch is 5", "give a list of names"]),
        ({"ratio_fade_steps": True}, ["ratio_fade_steps is True", "whole number"]),
        ({"ratio_fade_steps": "10"}, ["ratio_fade_steps is '10'", "whole number"]),
    ],
)
def test_register_refuses_values_of_other_types(values, words):
    with pytest.raises(BlockError) as error:
        register(**values)
    assert all(text in str(error.value) for text in words), error.value


def test_one_name_and_an_iterator_are_taken_as_they_are_meant():
    rules = ({"match": f"*.{name}.*", "block": "ffn"} for name in "ab")
    found = BlockSettings(accept_mismatch="block_lr_ratios", block_rules=rules)
    assert found.accept_mismatch == ("block_lr_ratios",) and [rule.match for rule in found.block_rules] == [
        "*.a.*",
        "*.b.*",
    ]


@pytest.fixture
def parse(monkeypatch):
    """Parses flags with a parser like Megatron's; gives back what it changes."""
    monkeypatch.setattr(settings, "_asked", None)

    def parsed(*flags):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
        for number in range(500):  # as many as Megatron's, whose usage would hide what is wrong
            parser.add_argument(f"--one-of-many-flags-{number}")
        return settings.add_arguments(parser).parse_args(flags)

    return parsed


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--block-lr-ratios", "qk=eight"], "'qk=eight' is not BLOCK=NUMBER"),
        (["--block-lr-ratios", "qk=-1"], "block_lr_ratios['qk'] is -1.0; give a finite number above 0"),
        (["--block-lr-ratios", "qk=inf"], "block_lr_ratios['qk'] is inf"),
        (["--block-lr-ratios", "embeding=10"], "unknown block type 'embeding'"),
        (["--block-lr-ratios", "qk=1", "qk=2"], "qk is given twice"),
        (["--block-weight-decay", "norm=nan"], "block_weight_decay['norm'] is nan"),
        (["--ratio-fade-steps", "-1"], "'-1' is not a whole number of iterations, 0 or above"),
        (["--ratio-fade-steps", "1.5"], "'1.5' is not a whole number"),
        (["--accept-mismatch", "ratios"], "invalid choice: 'ratios'"),
        (["--block-strict=false"], "ignored explicit argument 'false'"),
        (["--optimizer", "blockwise_adam"], "invalid choice: 'blockwise_adam'"),
    ],
)
def test_bad_flags_stop_with_argparses_usage(parse, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and len(said.splitlines()) < 5


def test_a_megatron_without_what_a_script_needs_is_told_in_a_sentence(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import megatron.of_another_version")
    words = [sys.executable, "-m", "blockwise_lr.megatron", "--on-cpu", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    told = [line for line in done.stderr.splitlines() if line.startswith("blockwise_lr.megatron: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(told) == 1
    assert "needs megatron.of_another_version, which megatron-core" in told[0] and "PYTHONPATH" in told[0]


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps([{"match": "*.a.*", "block": "ffn", "batch_dims": "1"}]), "batch_dims is '1'; give a whole number"),
        (json.dumps([{"match": "{a", "block": "ffn"}]), "has a brace without its partner"),
        (json.dumps({"match": "*.a.*", "block": "ffn"}), "holds no list"),
        ("null", "holds no list"),
        ("[{", "cannot read block rules"),
        ("[" * 200_000, "cannot read block rules"),
        (None, "cannot read block rules"),
    ],
)
def test_bad_rules_files_stop_with_argparses_usage(parse, capsys, tmp_path, text, words):
    path = tmp_path / "rules.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse("--block-rules", str(path))
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_blocks_of_ones_own_come_from_a_rules_file_before_them(parse, capsys, tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([{"match": "*.vision_model.*", "name": "vision"}]))
    rules, values = ["--block-rules", str(path)], ["--block-lr-ratios", "vision=0.1", "qk=4"]
    found = parse(*rules, *values, "--block-weight-decay", "vision=0.2")
    assert found.block_lr_ratios == {"vision": 0.1, "qk": 4.0} and found.block_weight_decay == {"vision": 0.2}
    made = BlockSettings(block_lr_ratios=found.block_lr_ratios, block_rules=found.block_rules)
    assert made.block_rules[0].rate.own == "vision"
    with pytest.raises(BlockError, match="the block 'vision' of block_rules has no ratio"):
        BlockSettings(block_rules=found.block_rules)
    with pytest.raises(SystemExit):
        parse(*values, *rules)
    assert "unknown block type 'vision'" in (said := capsys.readouterr().err) and "a --block-rules before it" in said


def test_presets_by_size_are_checked_before_there_is_a_model(parse, capsys):
    found = parse("--block-lr-ratios", "mup", "base_hidden_size=16")
    assert found.block_lr_ratios == {"preset": "mup", "base_hidden_size": 16.0}
    assert BlockSettings(block_lr_ratios=found.block_lr_ratios).block_lr_ratios == found.block_lr_ratios
    for flags, words in (
        (["mup"], "the preset mup of block_lr_ratios needs base_hidden_size"),
        (["mupp"], "did you mean 'mup'?"),
        (["auto"], "block_lr_ratios is 'auto'"),
    ):
        with pytest.raises(SystemExit):
            parse("--block-lr-ratios", *flags)
        assert words in capsys.readouterr().err


def config(optimizer="adam"):
    return types.SimpleNamespace(optimizer=optimizer)


def global_arguments(monkeypatch, **values):
    """Megatron's module of global variables, in the given state."""
    module = types.ModuleType("megatron.training.global_vars")
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", module)


def test_flags_are_found_where_megatron_keeps_them(parse, monkeypatch, tmp_path):
    (tmp_path / "rules.json").write_text(json.dumps([{"match": "*.a.*", "block": "ffn"}]))
    arguments = parse(
        "--optimizer",
        "blockwise_adam_mini",
        "--block-lr-ratios",
        "qk=5",
        "vo=2",
        "--no-block-strict",
        "--block-rules",
        str(tmp_path / "rules.json"),
        "--ratio-fade-steps",
        "7",
    )
    global_arguments(monkeypatch, _GLOBAL_ARGS=arguments)
    found = settings.settings_of(config())
    assert (found.kind, found.block_lr_ratios, found.block_strict, found.ratio_fade_steps) == (
        "blockwise_adam_mini",
        {"qk": 5.0, "vo": 2.0},
        False,
        7,
    )
    assert [rule.match for rule in found.block_rules] == ["*.a.*"]


@pytest.mark.parametrize(
    "state, words",
    [
        ({}, "has no _GLOBAL_ARGS any more"),
        (
            {"_GLOBAL_ARGS": None},
            "--optimizer blockwise_adamw was parsed, and Megatron's global arguments do not hold it",
        ),
        ({"_GLOBAL_ARGS": types.SimpleNamespace(optimizer="adam")}, "global arguments do not hold it"),
        ({"_GLOBAL_ARGS": types.SimpleNamespace(yaml_cfg="a.yaml")}, "--yaml-cfg makes Megatron ignore all flags"),
    ],
)
def test_an_optimizer_that_was_asked_for_and_lost_is_no_adam(parse, monkeypatch, state, words):
    parse("--optimizer", "blockwise_adamw")
    global_arguments(monkeypatch, **state)
    with pytest.raises(BlockError, match=words):
        settings.settings_of(config())


def test_megatrons_own_optimizers_stay_its_own(parse, monkeypatch):
    global_arguments(monkeypatch, _GLOBAL_ARGS=parse("--optimizer", "adam"))
    assert settings.settings_of(config()) is None
    parse("--optimizer", "blockwise_adamw")
    global_arguments(monkeypatch, _GLOBAL_ARGS=parse())  # parsed again, without
    assert settings.settings_of(config()) is None and settings.settings_of(config("sgd")) is None


def test_a_yaml_file_that_names_ours_is_refused(monkeypatch):
    global_arguments(monkeypatch, _GLOBAL_ARGS=types.SimpleNamespace(yaml_cfg="a.yaml"))
    with pytest.raises(BlockError, match="give flags and leave out --yaml-cfg"):
        settings.settings_of(config("blockwise_adamw"))
