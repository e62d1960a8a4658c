"""Two plans side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .report import gibibytes, short


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


# what of a plan's JSON is shown, under which name, and how
_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("flops", "compute (FLOPs)", _plain),
    ("days", "days", _plain),
    ("parameters", "parameters", short),
    ("tokens", "tokens", short),
    ("tokens_per_parameter", "tokens per parameter", _plain),
    ("optimum.parameters", "compute-optimal", short),
    ("sequence_length", "sequence length", _count),
    ("batch_tokens", "batch (tokens)", short),
    ("batch_sequences", "batch (sequences)", _count),
    ("steps", "steps", _count),
    ("warmup_steps", "warmup", _count),
    ("adamw_lr", "adamw_lr", _plain),
    ("base_lr.embedding", "lr, default ratios", _plain),
    ("base_lr.paper", "lr, paper's ratios", _plain),
    ("memory.optimizer", "optimizer", str),
    ("memory.layout", "layout", str),
    ("memory.ranks", "ranks", _count),
    ("memory.states.parameters", "parameters, bytes", gibibytes),
    ("memory.states.gradients", "gradients", gibibytes),
    ("memory.states.masters", "masters", gibibytes),
    ("memory.states.moments", "moments", gibibytes),
    ("memory.states.total", "states, total", gibibytes),
    ("memory.activations", "activations", gibibytes),
    ("memory.peak", "peak of a step", gibibytes),
)


@dataclass(frozen=True)
class Row:
    """One line: what it is, both plans' values ("" where a plan says none), and whether they differ."""

    name: str
    first: str
    second: str
    differs: bool


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """The lines of two plans, as :meth:`~.recipe.Recipe.as_dict` gives them; those that neither has are left out."""
    rows = []
    for path, name, form in _ROWS:
        values = [_at(plan, path) for plan in (first, second)]
        if values != [None, None]:
            one, other = ("" if value is None else form(value) for value in values)
            rows.append(Row(name, one, other, values[0] != values[1]))
    return rows


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Path in the JSON -> both values, of everything that is not equal."""
    plans = [dict(_flat(plan)) for plan in (first, second)]
    paths = dict.fromkeys([*plans[0], *plans[1]])
    return {path: [plan.get(path) for plan in plans] for path in paths if plans[0].get(path) != plans[1].get(path)}


def table(rows: list[Row], titles: tuple[str, str]) -> Table:
    """With a mark beside the lines that differ."""
    made = Table("", "", title="two plans; * differs")
    for title in titles:
        made.add_column(title, justify="right", overflow="fold")
    for row in rows:
        made.add_row("*" if row.differs else "", row.name, row.first, row.second, style="bold" if row.differs else None)
    return made


def _at(plan: Any, path: str) -> Any:
    for key in path.split("."):
        plan = plan.get(key) if isinstance(plan, Mapping) else None
    return plan


def _flat(plan: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(plan, Mapping):
        return [pair for key, value in plan.items() for pair in _flat(value, f"{path}.{key}" if path else str(key))]
    return [(path, plan)]
