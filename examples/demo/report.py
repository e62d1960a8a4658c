"""The demo's table and picture, from the results of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def steps_to(run: dict, loss: float) -> float | None:
    """The step at which a run first reaches a validation loss, between its evaluations by a straight line."""
    steps, losses = run["steps"], run["losses"]
    for i, value in enumerate(losses):
        if value <= loss:
            if i == 0:
                return float(steps[0])
            return float(np.interp(loss, [value, losses[i - 1]], [steps[i], steps[i - 1]]))
    return None


def table(results: dict) -> Table:
    """One row per full run."""
    base = results["runs"][0]
    made = Table(title=f"GPT on Python's standard library, {base['steps'][-1]} steps, DeepSpeed ZeRO-2 on 2 processes")
    for column in (
        "optimizer",
        "base lr",
        "validation loss",
        f"steps to {base['optimizer']}'s {base['losses'][-1]:.3f}",
        "seconds",
        "state per rank",
    ):
        made.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for run in results["runs"]:
        reached = steps_to(run, base["losses"][-1])
        made.add_row(
            run["optimizer"],
            f"{run['lr']:g}",
            f"{run['losses'][-1]:.3f}",
            "not reached" if reached is None else f"{reached:.0f} ({reached / base['steps'][-1]:.0%})",
            f"{run['seconds']:.0f}",
            f"{run['state_bytes'] / 2**20:.2f} MiB",
        )
    return made


def sweep_table(results: dict) -> Table:
    """What each learning rate of the sweep gave."""
    made = Table(title=f"learning rates tried, {results['sweep'][0]['steps'][-1]} steps each")
    made.add_column("optimizer")
    made.add_column("base lr", justify="right")
    made.add_column("validation loss", justify="right")
    for run in results["sweep"]:
        made.add_row(run["optimizer"], f"{run['lr']:g}", f"{run['losses'][-1]:.3f}")
    return made


def picture(results: dict, file: Path) -> None:
    """Validation loss over steps, one curve per full run."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for run, color in zip(results["runs"], ("#888888", "#1f5fbf", "#d1671b")):
        axes.plot(
            run["steps"], run["losses"], marker="o", ms=3, color=color, label=f"{run['optimizer']}, lr {run['lr']:g}"
        )
    axes.axhline(results["runs"][0]["losses"][-1], color="#888888", lw=0.8, ls="--")
    low = min(min(run["losses"]) for run in results["runs"])
    axes.set_ylim(low - 0.1, low + 2.0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("GPT on Python's standard library, DeepSpeed ZeRO-2")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(folder: Path) -> None:
    """Prints the tables and draws the picture of the results in a folder."""
    results = json.loads((folder / "results.json").read_text())
    console = Console(width=110)
    console.print(sweep_table(results))
    console.print(table(results))
    picture(results, folder / "curves.png")
    console.print(
        f"Picture: {folder / 'curves.png'}   Learning rates per block: tensorboard --logdir {folder / 'tensorboard'}"
    )
