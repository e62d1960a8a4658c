"""Runs what smoke.py names for a package, and writes a row of the table: loaded by run.py with ``-p matrix.plugin``."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from matrix.smoke import COLUMNS

# what old versions of DeepSpeed would train wrongly is refused by name, whatever the optimizer
REFUSED = re.compile(
    "loses gradients where offload_optimizer|gradients of the last micro batch alone|cannot save ZeRO stage 1 in bf16|"
    "leaves the last micro batch out of its averages"
)
PACKAGE, ROW = os.environ["BLOCKWISE_LR_MATRIX"].split("=", 1)
_found: dict[str, dict] = {
    column: {"passed": 0, "refused": 0, "failed": [], "worst": 0.0} for column in COLUMNS[PACKAGE]
}


def _column(test: str) -> str | None:
    return next((column for column, pattern in COLUMNS[PACKAGE].items() if re.match(pattern, test)), None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if _column(item.nodeid) is None])
    items[:] = [item for item in items if _column(item.nodeid) is not None]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cell = _found.get(_column(report.nodeid) or "")
    if cell is None:
        return
    if report.failed and REFUSED.search(str(report.longrepr)):
        cell["refused"] += 1
    elif report.failed:
        cell["failed"].append(report.nodeid.rpartition("::")[2])
    elif report.when == "call" and report.passed:
        cell["passed"] += 1
        cell["worst"] = max([cell["worst"], *(value for name, value in report.user_properties if name == "worst")])


def pytest_sessionfinish(session: pytest.Session) -> None:
    row = {
        "package": PACKAGE,
        "version": version(PACKAGE),
        "python": platform.python_version(),
        "torch": version("torch").partition("+")[0],
        "columns": _found,
    }
    Path(ROW).write_text(json.dumps(row, indent=2) + "\n")
