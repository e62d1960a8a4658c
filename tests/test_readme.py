"""README files and CONTRIBUTING.md: every snippet runs or parses, and every flag, option, name and file in them exists.

All in this process: snippets of Python are executed, a ds_config is read by DeepSpeed and builds an optimizer, commands of ours
run, and the arguments of other commands go through the parser that would read them. What the prose names is looked up
where it is defined (page_checks.py). The last tests show that each of the checks finds a misspelt word.
"""

import argparse
import importlib
import json
import pkgutil
import re

import pytest
from page_checks import (
    FENCE,
    FLAG,
    MEGATRON_FLAGS,
    ROOT,
    SOURCES,
    SPAN,
    broken_links,
    flags_of_settings,
    known_options,
    missing_files,
    unknown_flags,
    unknown_keys,
    unknown_targets,
    unknown_words,
    wrong_flags_of_ours,
    wrong_with,
)

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FILES += [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("README.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in FILES}


# ---- the pages


def snippets(kind):
    return [
        pytest.param(text, id=f"{page} {number}")
        for page, path in PAGES.items()
        for number, (found, text) in enumerate(FENCE.findall(path.read_text()))
        if found == kind
    ]


def commands():
    fenced = [
        line
        for path in PAGES.values()
        for kind, text in FENCE.findall(path.read_text())
        if kind in ("", "bash", "sh")
        for line in text.splitlines()
        if line.strip()
    ]
    indented = [  # code that is indented, as examples/reproduce has it
        line.strip()
        for path in PAGES.values()
        for line in re.findall(r"^    ((?:pip|python|torchrun|make|blockwise-lr) .*)$", path.read_text(), re.M)
    ]
    return [pytest.param(line, id=line[:60]) for line in dict.fromkeys(fenced + indented)]


@pytest.fixture(autouse=True)
def nothing_was_asked_for(monkeypatch):
    """Parsing ``--optimizer blockwise_adamw`` is remembered by the adapter; other tests must not meet it."""
    from blockwise_lr.megatron import settings

    monkeypatch.setattr(settings, "_asked", None, raising=False)


@pytest.mark.parametrize("text", snippets("python"))
def test_python_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(text, "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", snippets("json"))
def test_json_is_a_ds_config(text):
    from deepspeed.runtime.config import DeepSpeedConfig
    from twins import llama

    from blockwise_lr.deepspeed.build import build_optimizer
    from blockwise_lr.schedules import SCHEDULES

    parsed, model = DeepSpeedConfig(json.loads(text)), llama()
    optimizer = build_optimizer(parsed.optimizer_name, model, list(model.parameters()), parsed.optimizer_params)
    SCHEDULES[parsed.scheduler_name](optimizer, **parsed.scheduler_params)


@pytest.mark.parametrize("line", commands())
def test_commands_are_right(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert wrong_with(line, tmp_path) is None


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_what_a_page_names_exists(page):
    text, folder = page.read_text(), page.parent
    found = {
        "flags": unknown_flags(text),
        "values of flags": wrong_flags_of_ours(text),
        "keys": unknown_keys(text),
        "words": unknown_words(text),
        "files": missing_files(text, folder),
        "links": broken_links(text, folder),
        "make targets": unknown_targets(text),
    }
    assert not any(found.values()), {what: wrong for what, wrong in found.items() if wrong}


def test_the_table_of_options_is_complete():
    text = (ROOT / "integrations" / "blockwise_lr" / "README.md").read_text()
    table = text.partition("\n## Options\n")[2].partition("\n## ")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in SPAN.findall(row)]
    assert sorted(named) == sorted(known_options())


def test_the_table_of_flags_is_complete():
    text = (ROOT / "integrations" / "blockwise_lr" / "megatron" / "README.md").read_text()
    named = {flag for row in re.findall(r"^\| (`--.*?) \|", text, re.M) for flag in FLAG.findall(row)}
    assert named == {"--optimizer", *flags_of_settings()}


def test_the_table_of_patches_is_complete():
    from blockwise_lr import patches

    found = {info.name for info in pkgutil.iter_modules(patches.__path__)}
    found = {name for name in found if hasattr(importlib.import_module(f"blockwise_lr.patches.{name}"), "PATCH")}
    named = set(re.findall(r"`(\w+)\.py`", (ROOT / "patches" / "README.md").read_text()))
    assert found <= named


def test_losses_and_gains_are_those_of_the_rows():
    """The front page quotes the tables of examples/reproduce, which are made from the rows of the runs."""
    tables = (ROOT / "examples" / "reproduce" / "README.md").read_text()
    quoted = re.findall(r"[+-]\d\.\d{3}\b", (ROOT / "README.md").read_text())
    assert quoted and all(number in tables for number in quoted)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 1200


def test_megatron_knows_its_flags():
    arguments = pytest.importorskip("megatron.training.arguments", reason="megatron.training needs Python 3.12")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert [flag for flag in MEGATRON_FLAGS if flag not in parser._option_string_actions] == []


# ---- the checks find what is wrong


@pytest.mark.parametrize(
    "line, said",
    [
        ("blockwise-lr inspect configs/models/llama-0.25b.json --ratoi qk=4", "No such option"),
        ("blockwise-lr inspekt configs/models/llama-0.25b.json", "No such command"),
        ("blockwise-lr inspect configs/models/llama-0.26b.json", "llama-0.26b"),
        ("torchrun --nproc_per_nodes 8 -m blockwise_lr.megatron pretrain_gpt.py --optimizer blockwise_adamw", "nodes"),
        ("torchrun -m blockwise_lr.megatron pretrain_gpt.py --block-lr-ratio qk=8", "unrecognized arguments"),
        ("torchrun -m blockwise_lr.megatron pretrain_gpt.py --block-lr-ratios kq=8", "kq"),
        ("torchrun -m blockwise_lr.megatron pretrain_gpt.py --optimizer blockwise_adam", "invalid choice"),
        ("python -m blockwise_lr.deepspeed.universall A B", "there is no"),
        ("python -m blockwise_lr.deepspeed.universal A B --worker 4", "has no --worker"),
        ("python examples/demo/run.py --step 10", "has no --step"),
        ("python examples/demo/ran.py --steps 10", "there is no"),
        ("deepspeed train.py --deepspeed_conf configs/deepspeed/llama-0.25b.zero1.json", "unrecognized arguments"),
        ("deepspeed train.py --deepspeed_config configs/deepspeed/llama-0.25b.zero9.json", "is not there"),
        ("make tset", "no target tset"),
        ('pip install -e ".[deepsped]"', "no extra deepsped"),
        ("cmake .", "knows no command"),
    ],
)
def test_a_wrong_command_is_found(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert said in wrong_with(line, tmp_path)


@pytest.mark.parametrize(
    "check, right, wrong",
    [
        (unknown_flags, "`--ratio-fade-steps 10`", "`--ratio-fade-step 10`"),
        (unknown_flags, "--use-distributed-optimizer", "--use-distributed-optimiser"),
        (wrong_flags_of_ours, "`--accept-mismatch optimizer`", "`--accept-mismatch optimiser`"),
        (unknown_keys, '`"accept_mismatch": []`', '`"accept_mismatches": []`'),
        (unknown_keys, '{"zero_optimization": {"stage": 2}}', '{"zero_optimisation": {"stage": 2}}'),
        (unknown_words, "`block_lr_ratios`", "`block_lr_ratos`"),
        (unknown_words, "`BlockwiseAdamMini`", "`BlockwiseAdammini`"),
        (unknown_words, "`BLOCKWISE_LR_HUGE_PAGES=0`", "`BLOCKWISE_LR_HUGE_PAGE=0`"),
        (unknown_words, "`blockwise_lr.deepspeed.load_newest(e)`", "`blockwise_lr.deepspeed.load_newst(e)`"),
        (unknown_words, "`engine.save_checkpoint`", "`engine.save_checkpoints`"),
        (lambda text: missing_files(text, ROOT), "`patches/base.py`", "`patches/basis.py`"),
        (lambda text: broken_links(text, ROOT), "[a](patches/README.md#patches)", "[a](patches/README.md#patch)"),
        (lambda text: broken_links(text, ROOT), "[a](LICENSE)", "[a](LICENCE)"),
        (unknown_targets, "`make demo`", "`make demos`"),
    ],
)
def test_a_wrong_word_is_found(check, right, wrong):
    assert check(right) == [] and check(wrong) != []
