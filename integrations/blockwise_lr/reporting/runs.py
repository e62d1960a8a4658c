"""What a run has left behind, read into series of figures and facts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .names import known_name

_OF_SAMPLES = ("Train/Samples/", "Train/Blocks/")  # DeepSpeed's monitors count samples, not steps


@dataclass(frozen=True)
class Series:
    """A figure over a run.

    Attributes:
        steps: (n,), ascending.
        values: (n,), some perhaps not finite.
        seconds: (n,) since the run's first record; None where it was not recorded.
    """

    steps: np.ndarray
    values: np.ndarray
    seconds: np.ndarray | None = None

    @property
    def final(self) -> float:
        """The last value."""
        return float(self.values[-1])

    @property
    def best(self) -> tuple[float, float]:
        """(step, value) of the lowest finite value; nan without one."""
        if not np.isfinite(self.values).any():
            return math.nan, math.nan
        lowest = int(np.nanargmin(np.where(np.isfinite(self.values), self.values, np.nan)))
        return float(self.steps[lowest]), float(self.values[lowest])


@dataclass
class Run:
    """One training run.

    Attributes:
        name: of the run on the page.
        series: by the names of :mod:`.names`.
        unit: what ``steps`` of the series count: "steps", or "samples" where a step's samples are not known.
        arm: what other seeds of it share; empty: follows from the name.
        cell: what the arm was run in (model, tokens, batch), for rows that say so.
        seed: where it is known.
        seconds: of training, where only a total is known.
        numbers: further figures without a course, by the names of :mod:`.names`.
        facts: what ran: section ("versions", "settings", "blocks", ...) -> name -> value.
        files: what was read.
    """

    name: str
    series: dict[str, Series]
    unit: str = "steps"
    arm: str = ""
    cell: str = ""
    seed: str = ""
    seconds: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> float:
        """The largest step of any figure."""
        return max((float(series.steps[-1]) for series in self.series.values()), default=0.0)

    def seconds_at(self, name: str, step: float) -> float | None:
        """Seconds of training up to a step: recorded beside a figure, or by its share of the total."""
        series = self.series.get(name)
        if series is not None and series.seconds is not None:
            return float(np.interp(step, series.steps, series.seconds))
        return None if self.seconds is None else self.seconds * step / max(self.last_step, 1.0)


class Records:
    """Points of a run as they are read; what was written last counts where a step has several."""

    def __init__(self) -> None:
        self._points: dict[str, dict[float, tuple[float, float | None]]] = {}
        self.seconds: float | None = None
        self.seed = ""
        self.numbers: dict[str, float] = {}
        self.facts: dict[str, dict[str, str]] = {}
        self.files: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._points)

    def add(self, raw: str, step: float, value: float, time: float | None = None) -> None:
        """Adds a point.

        Args:
            raw: the figure's name as it was written.
            time: in seconds, from any beginning that all points share.
        """
        self._points.setdefault(raw, {})[float(step)] = (float(value), time)

    def fact(self, section: str, name: str, value: Any) -> None:
        """Adds a fact, as text."""
        self.facts.setdefault(section, {})[name] = value if isinstance(value, str) else f"{value}"

    def join(self, other: Records) -> None:
        """Adds what another source of the same run says; of a figure that both have, this one's counts."""
        mine = {known_name(raw) for raw in self._points}
        self._points.update({raw: found for raw, found in other._points.items() if known_name(raw) not in mine})
        for section, found in other.facts.items():
            self.facts[section] = {**found, **self.facts.get(section, {})}
        self.numbers = {**other.numbers, **self.numbers}
        self.seconds = other.seconds if self.seconds is None else self.seconds
        self.seed = self.seed or other.seed
        self.files += other.files

    def run(self, name: str, **attributes: Any) -> Run:
        """The run of these points."""
        batch, unit = self._batch()
        first = min((t for found in self._points.values() for _, t in found.values() if t is not None), default=None)
        series = {}
        for raw, found in self._points.items():
            scale = batch if raw.startswith(_OF_SAMPLES) else 1.0
            series[known_name(raw)] = _series(found, scale, first)
        if batch > 1:
            self.fact("settings", "samples of a batch", f"{batch:g}")
        said: dict[str, Any] = {"seed": self.seed, "seconds": self.seconds, **attributes}
        return Run(name, series, unit=unit, numbers=self.numbers, facts=self.facts, files=self.files, **said)

    def _batch(self) -> tuple[float, str]:
        """Samples of a step, and the unit that figures are in after division by it."""
        counted = [raw for raw in self._points if raw.startswith(_OF_SAMPLES)]
        if not counted:
            return 1.0, "steps"
        every = self._points.get("Train/Samples/lr", {})  # written at every step
        size = math.gcd(*(int(at) for at in every)) if len(every) > 1 else 0
        if size and all(at % size == 0 for raw in counted for at in self._points[raw]):
            return float(size), "steps"
        return 1.0, "samples"


def _series(found: Mapping[float, tuple[float, float | None]], scale: float, first: float | None) -> Series:
    steps = sorted(found)
    times = [found[at][1] for at in steps]
    seconds = None
    if first is not None and all(time is not None for time in times):
        seconds = _without_pauses([time - first for time in times if time is not None])
    return Series(np.array(steps) / scale, np.array([found[at][0] for at in steps]), seconds)


def _without_pauses(times: Iterable[float]) -> np.ndarray:
    """Never falling: a run that went back to a checkpoint wrote its later steps anew."""
    return np.maximum.accumulate(np.array(list(times)))
