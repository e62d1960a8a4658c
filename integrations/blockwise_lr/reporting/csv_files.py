"""CSV: DeepSpeed's csv_monitor, our csv_sink, exports of Weights & Biases, and any table with a column of steps."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ..blocks import BlockError
from .runs import Records

_STEPS = ("step", "steps", "iteration", "iter", "global_step")
_TIMES = ("seconds", "time", "wall_time", "elapsed")
_OF_WANDB = ("__MIN", "__MAX")  # beside each column of an export
_PREFIXES = (("Train_Samples_", "Train/Samples/"), ("Train_Blocks_", "Train/Blocks/"), ("Train_", "Train/"))
Rows = Iterator[list[str]]


def read_csv(file: Path) -> dict[str, Records]:
    """Run -> its figures; the run is "" but in an export of several. Empty for a table without a column of steps.

    Raises:
        BlockError: the file is no text.
    """
    found: dict[str, Records] = {}
    try:
        with file.open(newline="") as lines:
            rows = csv.reader(lines)
            head = next(rows, [])
            if is_monitor(file, head):
                found[""] = _of_monitor(file, head[1], rows)
            elif head == ["step", "name", "value"]:
                found[""] = _of_sink(rows)
            else:
                found = _of_table(head, rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BlockError(f"{file} cannot be read as CSV ({error})") from None
    for records in found.values():
        records.files.append(str(file))
    return {run: records for run, records in found.items() if records}


def is_monitor(file: Path, head: list[str]) -> bool:
    """Whether a file is one of csv_monitor's: it holds one figure, and is called by it."""
    return len(head) == 2 and head[0] == "step" and file.stem.startswith("Train_") and file.stem.endswith("_" + head[1])


def _of_monitor(file: Path, last: str, rows: Rows) -> Records:
    """The file's name is the figure's with its slashes lost: DeepSpeed's are known, and the head has what follows the last."""
    stem = file.stem
    for lost, prefix in _PREFIXES:
        if stem.startswith(lost):
            rest = stem.removeprefix(lost)
            name = prefix + (last if rest == last else f"{rest.removesuffix('_' + last)}/{last}")
            break
    records = Records()
    for row in rows:
        if len(row) == 2 and row[0] != "step":  # a restarted run writes its head again
            _add(records, name, row[0], row[1])
    return records


def _of_sink(rows: Rows) -> Records:
    records = Records()
    for row in rows:
        if len(row) == 3:
            _add(records, row[1], row[0], row[2])
    return records


def _of_table(head: list[str], rows: Rows) -> dict[str, Records]:
    lower = [name.strip().lower() for name in head]
    step = next((lower.index(name) for name in _STEPS if name in lower), None)
    time = next((lower.index(name) for name in _TIMES if name in lower), None)
    if step is None:
        return {}
    found: dict[str, Records] = {}
    for row in rows:
        if len(row) != len(head):
            continue
        for place, (name, value) in enumerate(zip(head, row)):
            if place in (step, time) or not value or name.endswith(_OF_WANDB):
                continue
            run, dash, metric = name.partition(" - ")
            run, metric = (run, metric) if dash else ("", name)
            _add(found.setdefault(run, Records()), metric, row[step], value, None if time is None else row[time])
    return found


def _add(records: Records, name: str, step: str, value: str, time: str | None = None) -> None:
    """A point, where all of it are numbers."""
    try:
        records.add(name, float(step), float(value), None if time is None else float(time))
    except ValueError:
        return
