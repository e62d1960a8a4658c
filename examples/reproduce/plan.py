"""What is to be run: ``plan.json``, in order, made into runs by the rows that are already there.

An entry names a cell (rung, tokens per parameter, batch) and arms. Each arm starts on three learning rates a factor of
2 apart, which go on in the direction of the best until that has a neighbor on both sides; where an entry says
``refine``, the best's two neighbors at a factor of sqrt 2 are tried then; all that on seed 0. At the best of them all
come the other seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ARMS
from model import RUNGS
from training import Run

PLAN = Path(__file__).parent / "plan.json"
Rows = Mapping[str, dict[str, Any]]  # by the run's key


@dataclass(frozen=True)
class Entry:
    """An entry of the plan.

    Attributes:
        question: what it is there to answer.
        seeds: how many at the best learning rate.
        refine: whether to try the best's neighbors at a factor of sqrt 2.
        center: where an arm's grid starts, in place of the arm's own (see arms.Arm.center).
        device: "cpu" or "cuda", which also says how exactly it computes (see training.Place).
        core_hours: estimated cost of all its runs; written by ``runner.py estimate``.
    """

    rung: str
    tokens_per_parameter: float
    batch: int
    arms: tuple[str, ...]
    question: str
    seeds: int = 3
    refine: bool = False
    center: Mapping[str, int] | None = None
    device: str = "cpu"
    core_hours: float | None = None

    def run(self, arm: str, k: int, seed: int = 0) -> Run:
        return Run(self.rung, self.tokens_per_parameter, self.batch, arm, k, seed)

    @property
    def cell(self) -> str:
        return self.run(self.arms[0], 0).cell


def load_plan(file: Path = PLAN) -> list[Entry]:
    """The plan's entries, in order.

    Raises:
        ValueError: an entry that cannot be run.
    """
    entries = [Entry(**{**entry, "arms": tuple(entry["arms"])}) for entry in json.loads(file.read_text())]
    for number, entry in enumerate(entries):
        unknown = {entry.rung} - set(RUNGS) | set(entry.arms) - set(ARMS) | set(entry.center or {}) - set(entry.arms)
        if unknown or not entry.arms or entry.batch % 1024 or entry.tokens_per_parameter <= 0 or entry.seeds < 1:
            raise ValueError(f"{file.name}, entry {number}: {', '.join(sorted(unknown)) or 'a value'} cannot be run")
    return entries


def load_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """All rows of a folder by their run's key."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def final_loss(row: Mapping[str, Any]) -> float:
    """A row's final validation loss; infinite where the run diverged."""
    return math.inf if row["final"] is None else row["final"]


def wanted(entry: Entry, arm: str, rows: Rows) -> list[Run]:
    """The runs of an arm that the rows so far call for; none when it is finished."""
    if ARMS[arm].rate_of:
        return _at_the_rate_of(entry, arm, rows)
    losses = {k: final_loss(rows[entry.run(arm, k).key]) for k in range(-40, 41) if entry.run(arm, k).key in rows}
    center = (entry.center or {}).get(arm, ARMS[arm].center)
    grid = [center - 2, center, center + 2]
    while not (missing := [k for k in grid if k not in losses]):
        best = min(grid, key=lambda k: losses[k])
        if math.isinf(losses[best]):
            grid.insert(0, grid[0] - 2)
        elif best == grid[0]:
            grid.insert(0, best - 2)
        elif best == grid[-1]:
            grid.append(best + 2)
        else:
            break
    if not missing and entry.refine:
        grid += [best - 1, best + 1]
        missing = [k for k in grid if k not in losses]
    if missing:
        return [entry.run(arm, k) for k in missing]
    best = min(grid, key=lambda k: losses[k])
    seeds = [entry.run(arm, best, seed) for seed in range(1, entry.seeds)]
    return [run for run in seeds if run.key not in rows]


def _at_the_rate_of(entry: Entry, arm: str, rows: Rows) -> list[Run]:
    """The runs of an arm at another's best learning rate, once that is known."""
    other = ARMS[arm].rate_of
    if any(run.seed == 0 for run in wanted(entry, other, rows)):
        return []
    losses = {k: final_loss(rows[entry.run(other, k).key]) for k in range(-40, 41) if entry.run(other, k).key in rows}
    best = min(losses, key=lambda k: losses[k])
    return [run for seed in range(entry.seeds) if (run := entry.run(arm, best, seed)).key not in rows]


def next_runs(entries: Iterable[Entry], rows: Rows) -> list[Run]:
    """What may be run now, in the plan's order; in an entry all arms' learning rates before the further seeds."""
    found: list[Run] = []
    for entry in entries:
        found += sorted((run for arm in entry.arms for run in wanted(entry, arm, rows)), key=lambda run: run.seed)
    return found
