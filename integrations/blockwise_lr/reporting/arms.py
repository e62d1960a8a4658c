"""Runs that differ in their seed alone, as one arm, and when an arm's loss reaches another's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..blocks import BlockError
from .names import FINAL, LOSS, VALIDATION
from .runs import Run, Series

_SEED = re.compile(r"[-_/. ,]*seed[-_= ]?(\d+)", re.IGNORECASE)
WINDOW = 0.05  # of a run's training losses, whose mean stands for one


@dataclass(frozen=True)
class Arm:
    """Runs of different seeds.

    Attributes:
        name: without the seed.
        runs: at least one, by seed.
    """

    name: str
    runs: tuple[Run, ...]

    def with_figure(self, name: str) -> list[Run]:
        """Its runs that have a figure."""
        return [run for run in self.runs if name in run.series]

    def mean(self, name: str) -> Series | None:
        """The mean over its runs, where all have values; of a single run its own."""
        series = [run.series[name] for run in self.with_figure(name)]
        if not series:
            return None
        if len(series) == 1:
            return series[0]
        low, high = max(one.steps[0] for one in series), min(one.steps[-1] for one in series)
        steps = series[0].steps[(series[0].steps >= low) & (series[0].steps <= high)]
        if not len(steps):
            return series[0]
        return Series(steps, np.mean([np.interp(steps, one.steps, one.values) for one in series], axis=0))


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order of their first runs.

    A run is of the arm that it says, or that its label says, or else of that of its name without ``seed3``.
    """
    has_cells = len({run.cell for run in runs}) > 1
    found: dict[str, list[Run]] = {}
    for run in runs:
        seed = _SEED.search(run.name)
        name = run.arm or (_SEED.sub("", run.name, count=1).strip("/ ") if seed else run.name) or run.name
        if seed and not run.seed:
            run.seed = seed[1]
        found.setdefault(f"{run.cell} {name}".strip() if has_cells else name, []).append(run)
    return [Arm(name, tuple(members)) for name, members in found.items()]


def compared_loss(arms: Sequence[Arm]) -> str:
    """The loss to compare by: validation where two arms or more have it, or the only one has; training otherwise.

    Raises:
        BlockError: arms have nothing in common, or count steps in different units.
    """
    figures = [{name for run in arm.runs for name in run.series} for arm in arms]
    if len(arms) > 1 and not any(a & b for i, a in enumerate(figures) for b in figures[:i]):
        said = "; ".join(f"{arm.name}: {', '.join(sorted(names)[:4])}" for arm, names in zip(arms[:4], figures))
        raise BlockError(f"the runs have no figure in common ({said}); report them one by one")
    for name in (VALIDATION, LOSS):
        having = [arm for arm in arms if arm.with_figure(name)]
        units = {run.unit for arm in having for run in arm.with_figure(name)}
        if len(units) > 1:
            raise BlockError(
                f"{name} is counted in steps in some runs and in samples in others; report them one by one, or log DeepSpeed's "
                f"Train/Samples/lr, which says the samples of a step"
            )
    return VALIDATION if sum(bool(arm.with_figure(VALIDATION)) for arm in arms) >= min(2, len(arms)) else LOSS


def smoothed(series: Series) -> Series:
    """A training loss, each value the mean of those of the last 5% of the run's points up to it."""
    width = max(round(WINDOW * len(series.values)), 1)
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    ends = np.arange(1, len(series.values) + 1)
    starts = np.maximum(ends - width, 0)
    return Series(series.steps, (sums[ends] - sums[starts]) / (ends - starts), series.seconds)


def judged(run: Run, name: str) -> Series:
    """The loss that comparisons go by: smoothed where it is a training loss."""
    return smoothed(run.series[name]) if name == LOSS else run.series[name]


def final(run: Run, name: str) -> float:
    """A run's final loss, by which gains go."""
    stated = run.numbers.get(FINAL) if name == VALIDATION else None
    return judged(run, name).final if stated is None else stated


def crossing(series: Series, goal: float) -> float | None:
    """The step at which a loss first is at a goal or below, by a straight line between two points; None: never."""
    below = np.flatnonzero(series.values <= goal)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0 or not math.isfinite(series.values[at - 1]):
        return float(series.steps[at])
    return float(np.interp(goal, [series.values[at], series.values[at - 1]], [series.steps[at], series.steps[at - 1]]))
