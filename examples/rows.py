"""Rows, which examples write one of per run: what every row says beside its figures, and how they are kept and shown.

A runner trains what its folder of rows lacks, so a second start goes on where the first was stopped; several may run side by
side on one folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Rows = dict[str, dict[str, Any]]  # by the run's key


def machine() -> dict[str, Any]:
    """What a run ran on; no names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of packages."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from a checkout
            found[package] = "checkout"
    return found


def commit(folder: Path) -> str | None:
    """The checkout's commit, with a plus where files of the folder, its rows left out, differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!rows")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def claim(name: str, folder: Path) -> Iterator[bool]:
    """Whether this process has a run to itself; the claim ends with the process, however that ends."""
    file = folder / f".{name}.lock"
    with file.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        file.unlink(missing_ok=True)


def write_row(row: Mapping[str, Any], file: Path) -> None:
    """Writes a row whole or not at all; numbers of a curve on one line each."""
    text = json.dumps({**row, "curve": None}, indent=1)
    curve = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(values)}" for key, values in row["curve"].items())
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text.replace('"curve": null', '"curve": {\n  ' + curve + "\n }") + "\n")
    partial.replace(file)


def load_rows(folder: Path) -> Rows:
    """All rows of a folder by their run's key."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def fill(wanted: Callable[[Rows], Iterable[Any]], train: Callable[[Any], Mapping[str, Any]], folder: Path) -> None:
    """Trains, one after the other, what the rows so far call for, the folder lacks and no other process is at.

    Args:
        wanted: the rows -> runs, in order, each with a ``key`` that names its row's file; asked anew behind each run.
        train: a run -> its row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for run in wanted(load_rows(folder)):
            file = folder / f"{run.key}.json"
            if file.exists():
                continue
            with claim(run.key, folder) as mine:
                if mine and not file.exists():
                    write_row(train(run), file)
                    print(f"{run.key} is done", file=sys.stderr, flush=True)
                    break
        else:
            return


def table(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first line is its head, and all columns but the first hold numbers."""
    rule = ["---"] + ["--:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with what lies between ``<!-- rows: NAME -->`` and ``<!-- end -->`` made anew."""
    return re.sub(
        r"<!-- rows: (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- rows: {found[1]} -->\n{tables[found[1]]}\n<!-- end -->",
        text,
        flags=re.S,
    )


def write_page(page: Path, tables: Mapping[str, str]) -> None:
    """Makes a page's tables anew, in place."""
    page.write_text(with_tables(page.read_text(), tables))


def save_figure(figure: Any, file: Path) -> None:
    """A matplotlib figure as a picture that is the same wherever it is drawn by the same versions."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=90, metadata={"Software": None})
