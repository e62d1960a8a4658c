"""What the rows say: best learning rates, gains and steps to another arm's loss, with 95% intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from arms import ARMS, learning_rate
from model import RUNGS
from plan import Rows, final_loss
from training import Run


@dataclass
class Result:
    """An arm in a cell.

    Attributes:
        losses: final loss on seed 0 by learning rate (in half octaves).
        seeds: the rows at the best of them, by seed.
    """

    arm: str
    losses: dict[int, float] = field(default_factory=dict)
    seeds: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def k(self) -> int:
        return min(self.losses, key=lambda k: self.losses[k])

    @property
    def lr(self) -> float:
        return learning_rate(self.k)

    @property
    def inside(self) -> bool:
        """Whether the best learning rate has a worse one on both sides, or is another arm's."""
        return bool(ARMS[self.arm].rate_of) or min(self.losses) < self.k < max(self.losses)

    @property
    def steps(self) -> int:
        return self.seeds[0]["steps"]

    def finals(self) -> list[float]:
        return [final_loss(row) for row in self.seeds.values()]


def results(rows: Rows) -> dict[str, dict[str, Result]]:
    """By cell and arm, cells from few to many parameters, tokens and tokens of a batch."""
    found: dict[str, dict[str, Result]] = {}
    runs = [(Run(**row["run"]), row) for row in rows.values()]
    rungs = list(RUNGS)
    runs.sort(key=lambda pair: (rungs.index(pair[0].rung), pair[0].tokens_per_parameter, pair[0].batch, pair[0].k))
    for run, row in runs:
        if run.seed == 0:
            found.setdefault(run.cell, {}).setdefault(run.arm, Result(run.arm)).losses[run.k] = final_loss(row)
    for run, row in sorted(runs, key=lambda pair: pair[0].seed):
        result = found.get(run.cell, {}).get(run.arm)
        if result is not None and run.k == result.k:
            result.seeds[run.seed] = row
    return found


def steps_to(row: Mapping[str, Any], loss: float) -> float:
    """The step at which a run first reaches a validation loss, on straight lines between the points of its curve;
    infinite where it does not."""
    steps, losses = row["curve"]["step"], [math.inf if x is None else x for x in row["curve"]["validation"]]
    for i, value in enumerate(losses):
        if value <= loss:
            return float(steps[0] if i == 0 else np.interp(loss, [value, losses[i - 1]], [steps[i], steps[i - 1]]))
    return math.inf


def pairs(base: Result, other: Result) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The rows of two arms that share a seed, and so their initial weights and the order of their text."""
    return [(base.seeds[seed], other.seeds[seed]) for seed in base.seeds if seed in other.seeds]


def gains(base: Result, other: Result) -> list[float]:
    """How much lower the other's final loss is, seed by seed."""
    return [final_loss(a) - final_loss(b) for a, b in pairs(base, other)]


def step_shares(base: Result, other: Result) -> list[float]:
    """Steps that the other takes to the base's last loss, over the base's steps, seed by seed."""
    return [steps_to(b, a["curve"]["validation"][-1]) / a["steps"] for a, b in pairs(base, other)]


def crossings(base: Result, other: Result) -> list[float]:
    """Share of the run from which on the other's curve stays below the base's, seed by seed; infinite where it ends
    above."""
    found = []
    for a, b in pairs(base, other):
        if a["curve"]["step"] != b["curve"]["step"]:
            continue
        below = [y < x for x, y in zip(a["curve"]["validation"], b["curve"]["validation"])]
        since = len(below)
        while since and below[since - 1]:
            since -= 1
        found.append(math.inf if since == len(below) else a["curve"]["step"][since] / a["steps"])
    return found
