"""The runs that files and folders hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..blocks import BlockError
from .csv_files import read_csv
from .events import is_events, read_events
from .json_files import TRAINER_STATE, is_trainer_state, load, read_trainer_state, rows_of, settings_of
from .logs import read_log
from .runs import Records, Run

_LOGS = (".log", ".txt", ".out", ".err")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_KINDS = (
    "TensorBoard events, CSV with a column of steps, a log of Megatron, of DeepSpeed or with lines such as 'step 10 loss 3.2', "
    "a trainer_state.json, or results of our demo and evidence"
)


def find_runs(word: str, told: Callable[[Path], None] = lambda _: None) -> list[Run]:
    """The runs that a word of the command line names: a file, or a folder that is searched.

    A folder's event files, csv_monitor and sink files, trainer_state.json and its one log are one run; so is each of several
    logs, each table and each row of results.

    Args:
        word: ``PATH`` or ``LABEL=PATH``; runs of one label are seeds of one arm.
        told: called with each file before it is read.

    Raises:
        BlockError: there is no such path, nothing in it is known, or a file cannot be read.
        ImportError: what reads it is not installed.
    """
    path, label = Path(word), ""
    if not path.exists() and "=" in word:
        label, _, rest = word.partition("=")
        path = Path(rest)
    if not path.exists():
        raise BlockError(f"{path} is neither a file nor a folder; name a run's log, its CSV or its folder")
    files = sorted(one for one in path.rglob("*") if _is_wanted(one, path)) if path.is_dir() else [path]
    try:
        runs = [run for folder in dict.fromkeys(one.parent for one in files) for run in _of_folder(folder, files, told)]
    except OSError as error:
        raise BlockError(f"{error.filename or path} cannot be read ({error.strerror})") from None
    if not runs:
        where = f"none of the {len(files)} files in {path} is" if path.is_dir() else f"{path} is not"
        raise BlockError(f"{where} one that report reads: {_KINDS}")
    if label:
        for run in runs:
            within = os.path.relpath(run.name, path) if not run.arm and len(runs) > 1 else run.name
            run.name = f"{label} {within}" if run.arm or len(runs) > 1 else label
            run.arm = f"{label} {run.arm}".strip()
    return runs


def _is_wanted(file: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in file.relative_to(root).parts) or not file.is_file():
        return False
    return is_events(file) or file.suffix in (*_LOGS, ".csv", ".json")


def _of_folder(folder: Path, files: list[Path], told: Callable[[Path], None]) -> list[Run]:
    here = [file for file in files if file.parent == folder]
    shared, own, rows = Records(), [], []
    events = [file for file in here if is_events(file)]
    for file in events[:1]:
        told(file)
    if events:
        shared.join(read_events(events))
    logs: list[tuple[str, Records]] = []
    for file in here:
        if file in events:
            continue
        told(file)
        if file.suffix == ".csv":
            for run, records in read_csv(file).items():
                together = not run and _belongs_to_folder(file)
                shared.join(records) if together else own.append((f"{file.stem} {run}".strip(), records))
        elif file.suffix == ".json":
            rows += _of_json(file, files, shared)
        elif records := read_log(file):
            logs.append((file.stem, records))
    if len(logs) == 1 and (shared or not own):
        shared.join(logs[0][1])
    else:
        own += logs
    for _, records in own if not shared else ():
        records.join(shared)  # settings that lie beside
    found = [shared.run(_name_of(folder) if len(files) > 1 else str(files[0].with_suffix("")))] if shared else []
    return found + [records.run(os.path.normpath(folder / name)) for name, records in own] + rows


def _belongs_to_folder(file: Path) -> bool:
    """Whether a CSV file holds some of the figures of its folder's run: csv_monitor's, and sinks'."""
    with file.open(newline="", errors="replace") as lines:
        head = lines.readline().strip().split(",")
    return head == ["step", "name", "value"] or (len(head) == 2 and file.stem.startswith("Train_"))


def _of_json(file: Path, files: list[Path], shared: Records) -> list[Run]:
    content = load(file)
    if file.name == TRAINER_STATE and is_trainer_state(content):
        if _is_newest(file, files):
            shared.join(read_trainer_state(file, content))
        return []
    for section, found in settings_of(content).items():
        for name, value in found.items():
            shared.fact(section, name, value)
    return rows_of(file, content)


def _is_newest(state: Path, files: list[Path]) -> bool:
    """Of the states in a Trainer's checkpoints the last, which holds all before it; none where the folder has its own."""
    number = _CHECKPOINT.search(state.parent.name)
    if number is None:
        return True
    beside = state.parent.parent
    others = [file for file in files if file.name == TRAINER_STATE and beside in (file.parent, file.parent.parent)]
    numbers = [_CHECKPOINT.search(other.parent.name) for other in others]
    return all(other is not None and int(other[1]) <= int(number[1]) for other in numbers)


def _name_of(folder: Path) -> str:
    if _CHECKPOINT.search(folder.name):
        folder = folder.parent
    return str(folder if folder.name else folder.absolute())


def with_short_names(runs: list[Run]) -> None:
    """Leaves out of paths what all of them begin with; the last part stays."""
    paths = [run for run in runs if not run.arm]
    parts = [run.name.split(os.sep) for run in paths]
    shared = 0
    while parts and all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    for run, one in zip(paths, parts):
        run.name = "/".join(one[shared:])
