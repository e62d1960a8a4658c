"""What the checks of README pages know: each check takes a page's text and returns what in it does not exist.

Names are looked up where they are defined (argparse and typer parsers, option models, DeepSpeed's constants, modules, files),
so that nothing has to be kept in step by hand. No process is started.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import re
import shlex
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from twins import VOCABULARY, make
from typer.main import get_command
from typer.testing import CliRunner

import blockwise_lr
from blockwise_lr.blocks import BlockType
from blockwise_lr.blocks.presets import SIZES
from blockwise_lr.blocks.rules import ROLES
from blockwise_lr.blocks.user_rules import UserRule
from blockwise_lr.cli import app
from blockwise_lr.optim import CLASSES
from blockwise_lr.schedules import SCHEDULES
from blockwise_lr.sequence_length import WarmupOptions
from blockwise_lr.transformers import FACTORIES

ROOT = Path(__file__).resolve().parents[1]
# these two hold misspelt words on purpose
CHECKS = {Path(__file__), Path(__file__).with_name("test_readme.py")}
SOURCES = ("integrations", "patches", "examples", "configs", "tests")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

# Flags of Megatron that our pages name: megatron.training, whose parser knows them, is on Python 3.12 only. There
# test_megatron_knows_its_flags compares this list with that parser.
MEGATRON_FLAGS = FLAG.findall("""
    --ckpt-format --decoupled-lr --dist-ckpt-optim-fully-reshardable --distributed-backend --exit-signal-handler --fp16
    --fp8-format --fp8-param-gather --global-batch-size --load --lr --min-lr --optimizer-cpu-offload --optimizer-cuda-graph
    --overlap-grad-reduce --overlap-param-gather --use-megatron-fsdp --use-mup --use-precision-aware-optimizer
    --use-torch-fsdp2 --weight-decay --yaml-cfg
""")
# keys of a ds_config that are ours, or that DeepSpeed has no constant for
OTHER_KEYS = {
    "checksums",
    "sequence_length_warmup",
    *WarmupOptions.model_fields,
    "block_metrics",
    "every",
    "bias",
    "pixels",
    "total_num_tokens",
}
OWN_BLOCKS = {"vision"}  # names that our pages give to blocks of a reader's own
# names in code of others that is not installed
OTHER_WORDS = {"build_llama_models"}


# ---- what there is


@functools.cache
def megatron_parser():
    """Megatron's parser with our flags; without megatron.training, one with our flags and those that the pages name."""
    from blockwise_lr.megatron.settings import add_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    with contextlib.suppress(ModuleNotFoundError):
        from megatron.training.arguments import add_megatron_arguments

        add_megatron_arguments(parser)
        if "--block-lr-ratios" not in parser._option_string_actions:  # an applied patch has added them already
            add_arguments(parser)
        return parser
    parser.add_argument("--optimizer", choices=["adam", "sgd"])
    in_files = {
        flag for file in (ROOT / "configs" / "megatron").glob("*.args") for flag in FLAG.findall(file.read_text())
    }
    add_arguments(parser)
    for flag in {*MEGATRON_FLAGS, *in_files} - set(parser._option_string_actions):
        parser.add_argument(flag, nargs="*")
    return parser


@functools.cache
def launchers():
    """The launchers' own parsers."""
    import deepspeed
    from torch.distributed.run import get_args_parser

    return {
        "torchrun": get_args_parser(),
        "deepspeed": deepspeed.add_config_arguments(argparse.ArgumentParser(allow_abbrev=False)),
    }


def flags_added_in(file):
    """The flags that a program's source adds to its parser."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    adding = (call for call in calls if getattr(call.func, "attr", "") in ("add_argument", "addoption"))
    words = (word.value for call in adding for word in call.args if isinstance(word, ast.Constant))
    return {word for word in words if str(word).startswith("--")}


@functools.cache
def known_flags():
    """Every flag of our programs and of the launchers and of Megatron."""
    programs = [file for folder in ("integrations", "examples", "tests") for file in (ROOT / folder).rglob("*.py")]
    commands = get_command(app).commands.values()
    return {
        *megatron_parser()._option_string_actions,
        *(flag for parser in launchers().values() for flag in parser._option_string_actions),
        *(flag for file in programs if file not in CHECKS for flag in flags_added_in(file)),
        *(flag for command in commands for parameter in command.params for flag in parameter.opts),
        *("--help", "--on-cpu", "--durations", "--timeout"),  # the last two are pytest's
        *("--partition", "--account"),  # sbatch's
        "--no-deps",  # pip's
    }


@functools.cache
def known_options():
    """Every option of our optimizers."""
    return {name for kind in CLASSES.values() for name in kind.Options.model_fields}


@functools.cache
def known_keys():
    """What a page may write as a key in JSON."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig

    in_ds_config = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    schedule = {name for kind in SCHEDULES.values() for name in inspect.signature(kind).parameters}
    return {
        *known_options(),
        *map(str, BlockType),
        *(*UserRule.model_fields, *ROLES, *schedule, *OTHER_KEYS, *OWN_BLOCKS, "preset", *SIZES),
        *(ZERO_OPTIMIZATION, *in_ds_config, *DeepSpeedZeroConfig.model_fields),
    }


@functools.cache
def identifiers():
    """Every word of our sources, and the names that follow from them."""
    from blockwise_lr.megatron import KINDS

    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".json", ".h")]
    files = [file for file in files if file not in CHECKS]
    words = (word for file in files for word in re.findall(r"\w+", file.read_text()))
    return {*words, *known_keys(), *CLASSES, *FACTORIES, *KINDS, *OTHER_WORDS}


@functools.cache
def extras():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.M))


@functools.cache
def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


# ---- checks: each returns what is wrong


def unknown_flags(text):
    return sorted(set(FLAG.findall(text)) - known_flags())


def unknown_keys(text):
    """Keys in JSON, in snippets and in prose; dicts of Python run in their snippets."""
    without_python = FENCE.sub(lambda found: "" if found[1] == "python" else found[0], text)
    return sorted(set(re.findall(r'"(\w+)":', without_python)) - known_keys())


def unknown_words(text):
    """Code spans that are one of our names, a name with underscores, or a dotted name, and that nothing is called."""
    spans = {match for match in SPAN.findall(FENCE.sub("", text))}
    words = {span for span in spans if re.fullmatch(r"[a-z]\w*_\w*|Blockwise\w*|BLOCKWISE\w*", span)}
    words |= {span.partition("=")[0] for span in spans if re.fullmatch(r"BLOCKWISE\w+=\w+", span)}
    dotted = {found[0] for span in spans if (found := re.match(r"[a-z]\w*(\.\w+)+", span)) and not is_file(found[0])}
    return sorted(words - identifiers()) + sorted(name for name in dotted if not exists(name))


def is_file(span):
    return re.search(r"\.(py|md|json|toml|ya?ml|args|sbatch|png|svg|cpp|pt|txt)$", span) is not None


def exists(dotted):
    """Whether a dotted name of ours or upstream's can be imported; names of anything else pass."""
    import deepspeed

    first, *rest = dotted.split(".")
    found = {"optimizer": blockwise_lr.BlockwiseAdamW, "engine": deepspeed.DeepSpeedEngine}.get(first)
    if found is None and first not in ("blockwise_lr", "deepspeed", "torch", "transformers"):
        return True
    name, found = first, found or importlib.import_module(first)
    for part in rest:
        name = f"{name}.{part}"
        if not hasattr(found, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def missing_files(text, folder):
    """Files named in code spans, from the page's own folder, the package's or the project's root."""
    spans = {span for span in SPAN.findall(FENCE.sub("", text)) if re.fullmatch(r"[\w./-]+", span)}
    named = {span for span in spans if is_file(span) or re.search(r"\w/$", span)}
    places = (folder, ROOT, ROOT / "integrations" / "blockwise_lr", ROOT / "integrations")
    outputs = ("runs/", "model.svg", "config.json", "pretrain_gpt.py", "train.py", "rows/")
    return sorted(n for n in named if not n.startswith(outputs) and not any((p / n).exists() for p in places))


def broken_links(text, folder):
    """Links to files that are not there, or to headings that the file does not have."""
    wrong = []
    for file, anchor in re.findall(r"\]\(([^)#:\s]*)#?([^):\s]*)\)", text):
        path = folder / file
        if not path.exists() or (anchor and anchor not in anchors(path.read_text() if file else text)):
            wrong.append(f"{file}#{anchor}" if anchor else file)
    return wrong


def anchors(text):
    """The names under which a page's headings can be linked to."""
    headings = (re.sub(r"[^\w -]", "", heading) for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {heading.strip().lower().replace(" ", "-") for heading in headings}


def unknown_targets(text):
    named = re.findall(r"`make ([\w-]+)", text)
    return sorted(set(named) - targets())


def wrong_flags_of_ours(text):
    """Code spans such as ``--accept-mismatch optimizer``, whose values our flags refuse."""
    spans = [span.split() for span in SPAN.findall(FENCE.sub("", text)) if not re.search(r"\.\.\.|<", span)]
    ours = [words for words in spans if len(words) > 1 and words[0] in ("--optimizer", *flags_of_settings())]
    return [wrong for words in ours if (wrong := refused(megatron_parser().parse_args, words))]


@functools.cache
def flags_of_settings():
    """The flags that we add to Megatron's."""
    from blockwise_lr.megatron.settings import add_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--optimizer", choices=["adam"])
    before = set(parser._option_string_actions)
    return set(add_arguments(parser)._option_string_actions) - before


def refused(parse, words):
    """What a parser says against its arguments, or None."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(words)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return None


# ---- commands


def words_of(line):
    """The words of a command as a shell makes them: comments and trailing dots left out, ``$(cat FILE)`` replaced."""
    line = re.sub(r"\$\(cat (\S+)\)", lambda found: (ROOT / found[1]).read_text(), line.partition(" #")[0])
    return [word for word in shlex.split(line, comments=True) if word not in ("...", "&")]


def wrong_with(line, out):
    """What is wrong with a command of a page, or None.

    Args:
        line: the command.
        out: folder for what commands of ours write.
    """
    words = words_of(line)
    if not words:
        return None
    program, rest = words[0], words[1:]
    if program in ("python", "torchrun"):
        return wrong_program(program, rest)
    checks = {
        "blockwise-lr": lambda: wrong_run(rest, out),
        "make": lambda: None if rest[0] in targets() else f"the Makefile has no target {rest[0]}",
        "deepspeed": lambda: refused(launchers()["deepspeed"].parse_args, rest[1:]),
        "pip": lambda: wrong_installation(rest),
        "git": lambda: None,
        "pre-commit": lambda: (
            None if (ROOT / ".pre-commit-config.yaml").is_file() and rest == ["install"] else "no such hook"
        ),
    }
    if program not in checks:
        return f"this test knows no command {program}"
    return checks[program]() or next((f"{word} is not there" for word in rest if is_missing(word)), None)


def is_missing(word):
    return word.startswith(tuple(f"{folder}/" for folder in SOURCES)) and not (ROOT / word.partition("::")[0]).exists()


def wrong_run(words, out):
    """A command of ours is run, in the project's root; what it writes goes to ``out``."""
    words = [str(out / word) if before in ("--output", "--plot") else word for before, word in zip(["", *words], words)]
    if "FOLDER" in words:  # a saved model, and token ids for it, that stand in for the reader's
        make("llama").save_pretrained(out / "model")
        np.save(out / "ids.npy", np.arange(10_000, dtype=np.uint16) % VOCABULARY)
        words = [
            str(out / {"FOLDER": "model"}.get(word, word)) if word in ("FOLDER", "ids.npy") else word for word in words
        ]
    if words[0] == "submit":  # there is no cluster to send it to
        words = ["submit", "--dry-run", *words[1:]]
    result = CliRunner().invoke(app, words)
    return None if result.exit_code == 0 else result.output


def wrong_installation(words):
    checkout = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2]) if len(words) > 2 else None
    pins = [word for word in words[3:] if Requirement(word).name not in ("deepspeed", "megatron-core")]
    if words[:2] != ["install", "-e"] or checkout is None or pins:
        return f"not an installation from a checkout: {words}"
    unknown = {*filter(None, (checkout[1] or "").split(","))} - extras()
    return f"there is no extra {', '.join(unknown)}" if unknown else None


def wrong_program(program, words):
    """``python FILE …``, ``python -m MODULE …`` and ``torchrun … -m MODULE …``."""
    if program == "torchrun":
        problem = refused(launchers()["torchrun"].parse_args, words)
        if problem:
            return problem
        words = words[words.index("-m") :]
    if words[0] != "-m":
        return wrong_arguments(words[0], ROOT / words[0], words[1:])
    module, rest = words[1], words[2:]
    if module == "pytest":
        return None if not (wrong := unknown_flags(" ".join(rest))) else f"pytest has no {wrong}"
    if module == "blockwise_lr.megatron":
        script = 1 if rest[0] == "--on-cpu" else 0
        return refused(megatron_parser().parse_args, rest[script + 1 :])
    with contextlib.suppress(ImportError):
        found = importlib.util.find_spec(module)
        if found is not None:
            return wrong_arguments(module, Path(found.origin), rest)
    return f"there is no {module}"


def wrong_arguments(program, file, words):
    """A flag that a script does not have, nor those in the same folder, to which a launcher hands its own on."""
    if not file.is_file():
        return f"there is no {program}"
    known = {flag for part in file.parent.glob("*.py") for flag in flags_added_in(part)}
    return next((f"{program} has no {word}" for word in words if word.startswith("--") and word not in known), None)
