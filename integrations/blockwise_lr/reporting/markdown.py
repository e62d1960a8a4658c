"""A report as Markdown, its pictures as SVG files in a folder beside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .facts import SECTIONS, common, differing
from .pictures import pictures_of
from .summary import Report, Table

_MOST_FACTS = 40  # of a section that are equal in all runs; the page has all of them


def as_markdown(report: Report, title: str, made_by: str, pictures: Path) -> str:
    """The text, with links to the pictures that this writes into a folder.

    Args:
        pictures: the folder, beside the file that the text goes to.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    found, tables = pictures_of(report), {table.title: table for table in report.tables()}
    lines = [f"# {title}", "", *(f"- {note}" for note in report.notes)]
    for name in dict.fromkeys(["Losses", *tables, *found]):
        if name not in tables and name not in found:
            continue
        lines += ["", f"## {name}", ""]
        if name in tables:
            lines += [_table(tables[name]), "", tables[name].note, ""]
        for number, picture in enumerate(found.get(name, []), 1):
            pictures.mkdir(parents=True, exist_ok=True)
            file = pictures / f"{re.sub(r'[^a-z]+', '-', name.lower())}-{number}.svg"
            file.write_text(picture.svg + "\n")
            said = ", ".join(f"{label} ({_line(style.dash, style.marker)})" for label, style in picture.legend)
            lines += [f"![{picture.title}]({pictures.name}/{file.name})", "", f"{picture.title}. {said}".strip(), ""]
    lines += ["", "## What ran", ""]
    runs = [run for arm in report.arms for run in arm.runs]
    for section in SECTIONS:
        if (table := differing(report.arms, section)) is not None:
            lines += [_table(table), ""]
        same = list(common(runs, section).items())
        if same:
            lines += [_table(Table("", [f"{section}, all", ""], [list(pair) for pair in same[:_MOST_FACTS]])), ""]
    lines += ["", made_by, ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _line(dash: Sequence[float], marker: str) -> str:
    names = {"o": "dots", "s": "squares", "^": "triangles", "v": "triangles down", "D": "diamonds", "x": "crosses"}
    return f"{'dashed' if dash else 'solid'}, {names.get(marker, 'stars')}"


def _table(table: Table) -> str:
    rule = ["---"] + ["--:"] * (len(table.head) - 1)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])
