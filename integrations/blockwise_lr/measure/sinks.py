"""Where figures go: functions of (figures, step), each around something that the user has."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Sink = Callable[[Mapping[str, float], int], None]


def csv_sink(path: str | os.PathLike) -> Sink:
    """Appends a line ``step,name,value`` for every figure; a new file begins with that line."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)

    def write(figures: Mapping[str, float], step: int) -> None:
        is_new = not file.exists()
        with file.open("a", newline="") as out:
            lines = csv.writer(out)
            if is_new:
                lines.writerow(("step", "name", "value"))
            lines.writerows((step, name, repr(value)) for name, value in figures.items())

    return write


def tensorboard_sink(writer: Any, prefix: str = "blocks/") -> Sink:
    """``add_scalar`` of a ``torch.utils.tensorboard.SummaryWriter`` for every figure."""

    def write(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(prefix + name, value, step)

    return write


def wandb_sink(run: Any, prefix: str = "blocks/") -> Sink:
    """``log`` of what ``wandb.init`` returns, or of the module ``wandb`` or ``trackio``, once a step."""

    def write(figures: Mapping[str, float], step: int) -> None:
        run.log({prefix + name: value for name, value in figures.items()}, step=step)

    return write
