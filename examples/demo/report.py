"""The demo's table and picture, from the results of its runs.

``python examples/demo/report.py`` writes the tables of examples/README.md anew, from the results that are kept in results/.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Arm:
    """The runs of one optimizer at its learning rate, one for each seed."""

    name: str
    lr: float
    runs: list[dict]

    @property
    def finals(self) -> list[float]:
        return [run["losses"][-1] for run in self.runs]

    @property
    def mean(self) -> dict:
        """The curve of the mean over seeds."""
        return {"steps": self.runs[0]["steps"], "losses": np.mean([run["losses"] for run in self.runs], 0).tolist()}


def arms_of(results: dict) -> list[Arm]:
    """The arms in the order they were run."""
    names = dict.fromkeys(run["optimizer"] for run in results["runs"])
    of = {name: [run for run in results["runs"] if run["optimizer"] == name] for name in names}
    return [Arm(name, runs[0]["lr"], runs) for name, runs in of.items()]


def rows(results: dict) -> list[list[str]]:
    """The table's head and one row per arm."""
    arms = arms_of(results)
    base = arms[0].mean
    last, wanted = base["steps"][-1], base["losses"][-1]
    goal = f"steps to {arms[0].name}'s {wanted:.3f}"
    made = [["optimizer", "base lr", "validation loss", "of each seed", goal, "state per rank"]]
    for arm in arms:
        reached = steps_to(arm.mean, wanted)
        made.append(
            [
                arm.name,
                f"{arm.lr:g}",
                f"{arm.mean['losses'][-1]:.3f}",
                ", ".join(f"{loss:.3f}" for loss in arm.finals),
                "not reached" if reached is None else f"{reached:.0f} ({reached / last:.0%})",
                f"{arm.runs[0]['state_bytes'] / 2**20:.2f} MiB",
            ]
        )
    return made


def table(results: dict) -> Table:
    """One row per arm."""
    arms = arms_of(results)
    steps, seeds = arms[0].mean["steps"][-1], len(arms[0].runs)
    made = Table(
        title=f"GPT on Python's standard library, {steps} steps, {seeds} seeds, DeepSpeed ZeRO-2 on 2 processes"
    )
    head, *lines = rows(results)
    for column in head:
        made.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for line in lines:
        made.add_row(*line)
    return made


def with_tables(text: str, folder: Path) -> str:
    """A page with what lies between ``<!-- demo: FILE -->`` and ``<!-- end -->`` made anew from the results in that file."""

    def made(match: re.Match) -> str:
        head, *lines = rows(json.loads((folder / match[1]).read_text()))
        shown = [head, ["---"] + ["--:"] * (len(head) - 1), *lines]
        return (
            f"<!-- demo: {match[1]} -->\n" + "\n".join(f"| {' | '.join(line)} |" for line in shown) + "\n<!-- end -->"
        )

    return re.sub(r"<!-- demo: (\S+) -->\n.*?<!-- end -->", made, text, flags=re.S)


def sweep_table(results: dict) -> Table:
    """What each learning rate gave, and whether the best lies between others."""
    made = Table(title=f"learning rates tried, {results['sweep'][0]['steps'][-1]} steps each, first seed")
    made.add_column("optimizer")
    made.add_column("base lr", justify="right")
    made.add_column("validation loss", justify="right")
    for run in results["sweep"]:
        made.add_row(run["optimizer"], f"{run['lr']:g}", f"{run['losses'][-1]:.3f}")
    return made


def picture(results: dict, file: Path) -> None:
    """Validation loss over steps: each arm's mean over seeds, its seeds thin."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    arms = arms_of(results)
    for arm, color in zip(arms, ("#888888", "#1f5fbf", "#d1671b")):
        mean = arm.mean
        axes.plot(mean["steps"], mean["losses"], marker="o", ms=3, color=color, label=f"{arm.name}, lr {arm.lr:g}")
        for run in arm.runs:
            axes.plot(run["steps"], run["losses"], color=color, lw=0.6, alpha=0.6)
    base = arms[0].mean["losses"][-1]
    axes.axhline(base, color="#888888", lw=0.8, ls="--", label=f"{arms[0].name}'s last: {base:.3f}")
    low = min(min(run["losses"]) for run in results["runs"])
    high = max(run["losses"][0] for run in results["runs"])
    axes.set_ylim(low - 0.1, high + 0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"GPT on Python's standard library, {len(arms[0].runs)} seeds and their mean")
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


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "README.md"
    page.write_text(with_tables(page.read_text(), page.parent))
