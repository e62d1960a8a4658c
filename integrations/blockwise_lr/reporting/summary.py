"""The tables of a report: results, what reaches equal loss when, what it cost, and what ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..blocks import BlockError
from ..tuning.statistics import interval
from .arms import Arm, arms_of, compared_loss, crossing, final, judged
from .json_files import STATE_BYTES
from .names import (
    BATCH,
    LOSS,
    MEMORY,
    SAMPLES_PER_SECOND,
    SECONDS_PER_STEP,
    TFLOPS,
    TOKENS_PER_SECOND,
    VALIDATION,
)
from .runs import Run


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is what the row is about."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Compared:
    """How an arm stands to the base.

    Attributes:
        gains: base's final loss less the arm's: per seed that both have, or of the means.
        steps, seconds: at which each run reaches the base's final loss (of its seed); None: it does not.
        shares: these steps over the base run's own.
    """

    gains: list[float]
    steps: list[float | None]
    shares: list[float | None]
    seconds: list[float | None]


@dataclass
class Report:
    """What is on the page.

    Attributes:
        arms: in the order given, the base first.
        loss: the figure that is compared.
        notes: what a reader should know about what was read.
    """

    arms: list[Arm]
    loss: str
    compared: dict[str, Compared]
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Arm:
        return self.arms[0]

    @property
    def unit(self) -> str:
        """What the runs' steps count."""
        return next((run.unit for arm in self.arms for run in arm.runs if run.series), "steps")

    def tables(self) -> list[Table]:
        """Those that have something to say."""
        every = (_results(self), _equal_loss(self), _cost(self))
        return [table for table in every if table is not None]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "loss": self.loss,
            "base": self.base.name,
            "arms": [_arm_dict(arm, self) for arm in self.arms],
            "notes": self.notes,
        }


def report_of(runs: Sequence[Run], base: str | None = None) -> Report:
    """Compares runs.

    Args:
        base: the arm that others are compared with; the first otherwise.

    Raises:
        BlockError: no arm of that name, or runs that cannot be compared.
    """
    arms = arms_of(runs)
    if base is not None:
        if base not in (arm.name for arm in arms):
            raise BlockError(f"--base is {base!r}; use one of {', '.join(arm.name for arm in arms)}")
        arms.sort(key=lambda arm: arm.name != base)
    loss = compared_loss(arms)
    if base is None:  # one without the loss can be no base
        arms.sort(key=lambda arm: not arm.with_figure(loss))
    elif not arms[0].with_figure(loss):
        raise BlockError(f"--base {base} has no {loss}, which the others are compared by; name another")
    compared = {}
    if arms[0].with_figure(loss):
        compared = {arm.name: _compared(arms[0], arm, loss) for arm in arms if arm.with_figure(loss)}
    return Report(arms, loss, compared, _notes(arms, loss))


def _compared(base: Arm, arm: Arm, loss: str) -> Compared:
    finals = {run.seed: final(run, loss) for run in base.with_figure(loss)}
    goals = {run.seed: judged(run, loss).final for run in base.with_figure(loss)}
    mean = float(np.mean(list(goals.values())))
    ends = {run.seed: float(run.series[loss].steps[-1]) for run in base.with_figure(loss)}
    runs = arm.with_figure(loss)
    paired = [run for run in runs if run.seed and run.seed in finals]
    gains = [finals[run.seed] - final(run, loss) for run in paired]
    if not gains:
        gains = [float(np.mean(list(finals.values()))) - float(np.mean([final(run, loss) for run in runs]))]
    steps, shares, seconds = [], [], []
    for run in runs:
        is_paired = run in paired or base is arm
        reached = crossing(judged(run, loss), goals[run.seed] if is_paired else mean)
        end = ends[run.seed] if is_paired else float(np.mean(list(ends.values())))
        steps.append(reached)
        shares.append(None if reached is None else reached / end)
        seconds.append(None if reached is None else run.seconds_at(loss, reached))
    return Compared(gains, steps, shares, seconds)


def _notes(arms: Sequence[Arm], loss: str) -> list[str]:
    notes = []
    without = [arm.name for arm in arms if not arm.with_figure(loss)]
    if without and len(without) < len(arms):
        notes.append(f"No {loss.replace('_', ' ')} in {_listed(without)}: not compared.")
    ends = {arm.name: {float(run.series[loss].steps[-1]) for run in arm.with_figure(loss)} for arm in arms}
    lengths = sorted(set().union(*ends.values()))
    if len(lengths) > 1:
        notes.append(
            f"The runs end at different steps ({', '.join(f'{end:,.0f}' for end in lengths[:6])}): final losses and shares of "
            f"steps compare runs of other lengths."
        )
    for arm in arms:
        for run in arm.runs:
            broken = [name for name in (LOSS, VALIDATION) if name in run.series and not _finite(run, name)]
            if broken:
                notes.append(f"{run.name} has a {_listed(broken)} that is not finite.")
    return notes


def _finite(run: Run, name: str) -> bool:
    return bool(np.isfinite(run.series[name].values).all())


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


# ---- tables


def _results(report: Report) -> Table | None:
    if not any(arm.with_figure(name) for arm in report.arms for name in (LOSS, VALIDATION)):
        return None
    rows = []
    for arm in report.arms:
        validations = [run.series[VALIDATION] for run in arm.with_figure(VALIDATION)]
        best = [one.best for one in validations]
        rows.append(
            [
                arm.name,
                _seeds(arm),
                f"{max(run.last_step for run in arm.runs):,.0f}",
                spread([judged(run, LOSS).final for run in arm.with_figure(LOSS)], ".4f"),
                spread([final(run, VALIDATION) for run in arm.with_figure(VALIDATION)], ".4f"),
                spread([value for _, value in best], ".4f"),
                spread([step for step, _ in best], ",.0f"),
            ]
        )
    head = [
        "run",
        "seeds",
        report.unit,
        "training loss",
        "validation loss",
        "best validation loss",
        f"at {report.unit[:-1]}",
    ]
    note = "Training loss: mean of the last 5% of a run's points. Of several seeds the mean, and lowest to highest."
    return _without_empty_columns(Table("Losses", head, rows, note))


def _seeds(arm: Arm) -> str:
    named = [run.seed for run in arm.runs if run.seed]
    return f"{len(arm.runs)}" if len(arm.runs) > 1 or not named else f"1 ({named[0]})"


def _equal_loss(report: Report) -> Table | None:
    if len(report.compared) < 2:
        return None
    base = report.base
    rows = []
    for arm in report.arms:
        found = report.compared.get(arm.name)
        if found is None:
            continue
        is_base = arm is base
        times = [second for second in found.seconds if second is not None]
        rows.append(
            [
                arm.name,
                "" if is_base else plus_minus(found.gains, "+.4f"),
                _reached(found.steps, ",.0f"),
                _reached(found.shares, ".0%"),
                duration(float(np.mean(times))) if len(times) == len(found.steps) and times else "",
            ]
        )
    ends = [judged(run, report.loss).final for run in base.with_figure(report.loss)]
    goal = f"where {base.name}'s curve of the {report.loss.replace('_', ' ')} ends, {spread(ends, '.4f')}"
    head = ["run", "gain in final loss", f"{report.unit} to it", f"of the base's {report.unit}", "time to it"]
    note = (
        f"Equal loss: {goal} (of the same seed where both have it), and when it is first reached. Gain: the base's final loss "
        f"less the run's, with the 95% interval over seeds that both have (Student's t). Time: of training as recorded, or "
        f"the run's total by its steps."
    )
    return _without_empty_columns(Table("To equal loss", head, rows, note))


def _reached(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    if len(known) < len(values):
        return f"{format(float(np.mean(known)), form)}; not reached by {len(values) - len(known)} of {len(values)}"
    return spread(known, form)


def _cost(report: Report) -> Table | None:
    rows = []
    for arm in report.arms:
        costs = [costs_of(run) for run in arm.runs]
        means = {name: _mean([cost.get(name) for cost in costs]) for name in _COSTS}
        rows.append([arm.name, *("" if (value := means[name]) is None else _COSTS[name](value) for name in _COSTS)])
    table = _without_empty_columns(
        Table(
            "Memory and throughput",
            ["run", *_COSTS],
            rows,
            "Means over seeds; per step and per second, medians over a run.",
        )
    )
    return table if len(table.head) > 1 else None


def costs_of(run: Run) -> dict[str, float]:
    """What a run cost, by the columns of the table; those that are known."""
    found: dict[str, float] = {}
    total = run.seconds if run.seconds is not None else _recorded(run)
    if total:
        found["training time"] = total
    for name, column in (
        (SECONDS_PER_STEP, "seconds a step"),
        (SAMPLES_PER_SECOND, "samples/s"),
        (TFLOPS, "TFLOP/s a GPU"),
    ):
        if (value := _median(run, name)) is not None and value > 0:
            found[column] = value
    tokens = _median(run, TOKENS_PER_SECOND)
    if tokens is None and "seconds a step" in found:
        batch, length = _median(run, BATCH), run.facts.get("settings", {}).get("seq_length", "")
        tokens = batch * float(length) / found["seconds a step"] if batch and length.isdigit() else None
    if tokens is not None:
        found["tokens/s"] = tokens
    for name, column in ((MEMORY, "peak memory"), (STATE_BYTES, "optimizer state a rank")):
        value = run.numbers.get(name) or (float(np.max(run.series[name].values)) if name in run.series else 0.0)
        if value > 0:
            found[column] = value
    return found


def _median(run: Run, name: str) -> float | None:
    if name in run.series:
        return float(np.median(run.series[name].values))
    return run.numbers.get(name)


def _recorded(run: Run) -> float:
    """Seconds from a run's first record to its last."""
    return max((float(one.seconds[-1]) for one in run.series.values() if one.seconds is not None), default=0.0)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def duration(seconds: float) -> str:
    """2 h 5 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def size(count: float) -> str:
    """1.5 GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


_COSTS = {
    "training time": duration,
    "seconds a step": lambda value: f"{value:.3g}",
    "tokens/s": lambda value: f"{value:,.0f}",
    "samples/s": lambda value: f"{value:,.4g}",
    "TFLOP/s a GPU": lambda value: f"{value:.4g}",
    "peak memory": size,
    "optimizer state a rank": size,
}


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and lowest to highest of several."""
    if not values:
        return ""
    mean = format(float(np.mean(values)), form)
    low, high = format(min(values), form), format(max(values), form)
    return mean if low == high else f"{mean} ({low} to {high})"


def plus_minus(values: Sequence[float], form: str) -> str:
    """Mean and half of its 95% interval, of several."""
    mean, half = interval(values)
    return format(mean, form) + ("" if math.isnan(half) else f" ± {format(half, form.lstrip('+'))}")


def _without_empty_columns(table: Table) -> Table:
    kept = [place for place in range(len(table.head)) if place == 0 or any(row[place] for row in table.rows)]
    return Table(
        table.title,
        [table.head[place] for place in kept],
        [[row[place] for place in kept] for row in table.rows],
        table.note,
    )


def _arm_dict(arm: Arm, report: Report) -> dict[str, Any]:
    found = report.compared.get(arm.name)
    return {
        "name": arm.name,
        "gain": None if found is None or arm is report.base else found.gains,
        "steps_to_base": None if found is None else found.steps,
        "seconds_to_base": None if found is None else found.seconds,
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "steps": run.last_step,
                "final": {name: final(run, name) for name in (LOSS, VALIDATION) if name in run.series},
                "best_validation": run.series[VALIDATION].best if VALIDATION in run.series else None,
                "costs": costs_of(run),
                "facts": run.facts,
                "files": run.files,
                "last": {name: series.final for name, series in run.series.items()},
            }
            for run in arm.runs
        ],
    }
