"""The table of upstream versions, from the rows that run.py has written."""

from __future__ import annotations

import json
from pathlib import Path

from matrix.smoke import COLUMNS, VERSIONS

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"


def rows(package: str) -> list[dict]:
    """A package's rows, in the order of the versions; what was never run is left out."""
    found = [HERE / "rows" / f"{package}-{version}.json" for version in VERSIONS[package]]
    return [json.loads(path.read_text()) for path in found if path.is_file()]


def cell(found: dict) -> str:
    """A cell: how many tests passed, and the worst relative difference from the single process where they measure one."""
    if found["failed"]:
        return f"**{len(found['failed'])} failed**"
    refused = found.get("refused")
    if not found["passed"]:
        return f"{refused} refused" if refused else "not run"
    passed = f"{found['passed']}: {found['worst']:.0e}" if found["worst"] else str(found["passed"])
    return passed + (f", {refused} refused" if refused else "")


def table(package: str) -> str:
    """One package's table."""
    columns = list(COLUMNS[package])
    lines = [f"| {package} | {' | '.join(columns)} | Python, torch |", "|---|" + "---|" * (len(columns) + 1)]
    for row in rows(package):
        cells = " | ".join(cell(row["columns"].get(column, {"failed": [], "passed": 0})) for column in columns)
        lines.append(f"| {row['version']} | {cells} | {row['python']}, {row['torch']} |")
    return "\n".join(lines)


def page_with_tables(page: str) -> str:
    """The page with the tables of the rows in it."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n" + "\n\n".join(map(table, COLUMNS)) + f"\n\n{END}{tail}"


def write_tables() -> None:
    """Writes the tables into README.md."""
    PAGE.write_text(page_with_tables(PAGE.read_text()))
