"""A recipe in words and tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .laws import FITTED_FLOPS, LAWS, chinchilla, optimum, optimum_range
from .recipe import Memory, Recipe

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """7.1B for 7,100,000,000."""
    for unit, letter in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def gibibytes(value: int) -> str:
    return f"{value / 2**30:,.2f} GiB"


def show(made: Recipe, console: Console, days: str | None = None) -> None:
    """Prints a recipe."""
    console.print(_budget(made, days))
    console.print(_laws(made))
    for line in _notes(made):
        console.print(line, soft_wrap=not console.is_terminal)
    if made.memory is not None:
        console.print(_memory(made.memory))


def _budget(made: Recipe, days: str | None) -> Table:
    budget, best = made.budget, optimum(made.budget.flops)
    low, high = optimum_range(budget.flops)
    table = Table(title="the run", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    rows = [
        ("compute", f"{made.flops:.3g} FLOPs" + (f", {days}" if days else "")),
        ("parameters", f"{short(budget.parameters)} (a token passes them; with output layer)"),
        ("tokens", f"{short(budget.tokens)}, {budget.tokens_per_parameter:.3g} per parameter"),
        (
            "compute-optimal",
            f"{short(best.parameters)} ({short(low)} to {short(high)}), {best.tokens_per_parameter:.3g} tokens each",
        ),
        ("20 tokens each", f"{short(chinchilla(budget.flops).parameters)}"),
        ("batch", f"{short(made.batch)} tokens, {made.sequences:,} sequences of {made.length:,}"),
        ("steps", f"{made.steps:,}, warmup {made.warmup_steps:,}" + _growing(made)),
        ("adamw_lr", f"{made.adamw_lr:.3g} (AdamW's single rate)"),
        ("lr, default ratios", f"{made.base_lr():.3g} (what adamw_lr makes of it)"),
        ("lr, paper's ratios", f"{made.base_lr('paper'):.3g}"),
    ]
    for name, said in rows:
        table.add_row(name, said)
    return table


def _growing(made: Recipe) -> str:
    if made.lengths is None:
        return ""
    options = made.lengths.options
    plain = round(made.budget.tokens / made.batch)
    return f"; {plain:,} at full length (from {options.start} tokens over {options.steps:,} steps; decay by tokens)"


def _laws(made: Recipe) -> Table:
    table = Table("law", title="what others' laws say of AdamW")
    for column in ("lr", "batch (tokens)"):
        table.add_column(column, justify="right")
    table.add_column("fitted on")
    for law in LAWS:
        batch = "" if law.batch is None else short(law.batch(made.budget, made.body))
        beyond = " (extrapolated here)" if law.is_extrapolated(made.budget) else ""
        table.add_row(law.name, f"{law.lr(made.budget, made.body):.3g}", batch, law.fitted + beyond)
    return table


def _notes(made: Recipe) -> list[str]:
    notes = []
    if made.budget.outside > 1:
        low, high = FITTED_FLOPS
        notes.append(
            f"Extrapolation: the size law was fitted on {low:.3g} to {high:.3g} FLOPs; this run is {made.budget.outside:,.3g} "
            f"times outside."
        )
    best = optimum(made.budget.flops)
    off = made.budget.parameters / best.parameters
    if not 0.5 <= off <= 2:
        notes.append(
            f"The model has {off:.2g} times the compute-optimal size: fine where it is to be cheap to serve, or given."
        )
    notes.append(
        "Sizes and batches: arXiv 2406.19146, for a constant learning rate. It raises beta2 at small batches, to 0.99 or more; "
        "below which batch is not known here. Warmup: as many tokens as parameters, at most a tenth of the run."
    )
    return notes


def _memory(memory: Memory) -> Table:
    columns = {memory.optimizer: memory.states, "adamw": memory.with_adamw}
    table = Table("bytes", title=f"fullest of {memory.ranks:,} ranks, {memory.layout}", min_width=60)
    for name in columns:
        table.add_column(name, justify="right")
    for name in ("parameters", "gradients", "masters", "moments", "total"):
        table.add_row(name, *(gibibytes(getattr(states, name)) for states in columns.values()))
    if memory.activations is not None:
        table.add_row("activations", *[gibibytes(memory.activations)] * len(columns))
    if memory.peak is not None and memory.peak_with_adamw is not None:
        peaks = {memory.optimizer: memory.peak, "adamw": memory.peak_with_adamw}
        table.add_row("at the peak of a step", *map(gibibytes, peaks.values()))
    table.caption = "Without the framework's buckets, gathered parameters and the allocator's own."
    return table
