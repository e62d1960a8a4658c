"""What is supported: optimizer x feature, each cell with the tests that show it.

The table that users read, integrations/blockwise_lr/SUPPORT.md, is written from this list and from what a run of the suite
has passed (``make support``). A cell is "tested" or "refused" as its row says where all of its tests passed on the ranks
they need, and "untested" otherwise; test_support.py holds the file and the list together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kinds import KINDS

# optimizers with a column of their own; the others step as one of them does, see kinds.Kind.like
COLUMNS = [name for name, kind in KINDS.items() if not kind.like]
FILE = Path(__file__).resolve().parents[1] / "integrations" / "blockwise_lr" / "SUPPORT.md"
TESTED, REFUSED, UNTESTED = "tested", "refused", "untested"


@dataclass(frozen=True)
class Row:
    """One feature.

    Attributes:
        feature: as users call it.
        tests: of each optimizer, as regular expressions over test ids from the start; what begins with "!" is the test of
            its refusal. An optimizer without one is untested.
        note: what holds beside it.
    """

    feature: str
    tests: Mapping[str, str]
    note: str = ""


def both(test: str) -> dict[str, str]:
    """The same tests for all optimizers."""
    return dict.fromkeys(COLUMNS, test)


def each(test: str | Callable[[str], str]) -> dict[str, str]:
    """A test's cases that name the optimizer, after what is given or where the function puts it."""
    if callable(test):
        return {name: test(name) for name in COLUMNS}
    return {name: f"{test}.*{name}(?![A-Za-z])" for name in COLUMNS}


def verdict(tests: str, outcomes: Mapping[str, bool]) -> str:
    """The word for a cell, given which tests ran and whether they passed."""
    pattern = re.compile(tests.lstrip("!"))
    found = [passed for test, passed in outcomes.items() if pattern.match(test)]
    if not tests or not found or not all(found):
        return UNTESTED
    return REFUSED if tests.startswith("!") else TESTED


def table(sections: Mapping[str, Sequence[Row]], outcomes: Mapping[str, bool]) -> str:
    """The page."""
    lines = [
        "# What is supported",
        "",
        "Written by `make support` from what the test suite has passed; tests/support_rows.py names the tests of each cell.",
        '"Refused" stops with one sentence on every rank before the first step. All runs are on the CPU with gloo; what',
        "has been run by hand on a GPU is in [tests/gpu](../../tests/gpu/README.md).",
        "",
    ]
    for title, rows in sections.items():
        columns = columns_of(rows)
        lines += [f"## {title}", "", f"| feature | {' | '.join(columns)} | |", "|---|" + "---|" * len(columns) + "---|"]
        lines += [
            f"| {row.feature} | {' | '.join(verdict(row.tests.get(name, ''), outcomes) for name in columns)} | {row.note} |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def columns_of(rows: Sequence[Row]) -> Sequence[str]:
    """The optimizers of a section: those of all, or its own where it names none of them."""
    named = list(dict.fromkeys(name for row in rows for name in row.tests))
    return COLUMNS if not named or set(named) & set(COLUMNS) else named


def counts(sections: Mapping[str, Sequence[Row]], outcomes: Mapping[str, bool]) -> dict[str, int]:
    """How many cells have each word."""
    words = [
        verdict(row.tests.get(name, ""), outcomes)
        for rows in sections.values()
        for row in rows
        for name in columns_of(rows)
    ]
    return {word: words.count(word) for word in (TESTED, REFUSED, UNTESTED)}
