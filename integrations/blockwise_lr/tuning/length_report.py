"""What a search for a sequence length warmup has found, as a table, a picture, and lines to paste."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from .lengths import Lengths, LengthSearch, Losses

Runs = Mapping[Lengths, Losses]


def verdict(search: LengthSearch, runs: Runs) -> str:
    """One sentence: what was found, or what to change."""
    found = search.found(runs)
    if found is None:
        return (
            f"No start below {search.end} tokens is calm in {search.steps} steps: lower the learning rate, lengthen its "
            f"warmup, or give more --steps, as too fast a growth is unstable too."
        )
    more = " (the most that was allowed)" if found.steps == search.most else ""
    return f"The smallest calm start is {found.start} tokens, with {found.steps} steps at most{more}."


def table(search: LengthSearch, runs: Runs) -> Table:
    """All runs."""
    found = Table(title=f"{len(runs)} runs")
    for column in ("start", "steps", "validations", "worst perplexity / best before", "calm"):
        found.add_column(column, justify="right")
    for lengths, losses in sorted(runs.items()):
        worst = search.worst(losses)
        shown = "diverged" if math.isinf(worst) else f"{worst:.3f}"
        calm = "yes" if search.is_calm(losses) else "no"
        found.add_row(str(lengths.start), str(lengths.steps), str(len(losses)), shown, calm)
    return found


def to_paste(search: LengthSearch, found: Lengths) -> str:
    """For a ds_config, and as flags of Megatron's."""
    key = {"start": found.start, "end": search.end, "steps": found.steps}
    flags = f"--sequence-length-warmup-start {found.start} --sequence-length-warmup-steps {found.steps}"
    return f'"sequence_length_warmup": {json.dumps(key)}\n{flags}'


def as_json(search: LengthSearch, runs: Runs) -> str:
    """Runs and what was found."""
    found = search.found(runs)
    rows = [
        {
            "start": lengths.start,
            "steps": lengths.steps,
            "calm": search.is_calm(losses),
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        }
        for lengths, losses in sorted(runs.items())
    ]
    best = None if found is None else {"start": found.start, "end": search.end, "steps": found.steps}
    return json.dumps({"found": best, "runs": rows}, indent=1)


def draw(search: LengthSearch, runs: Runs, file: Path) -> None:
    """Each run's validation losses; those that are not calm dashed, their end crossed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    found = search.found(runs)
    for number, (lengths, losses) in enumerate(sorted(runs.items())):
        calm, finite = search.is_calm(losses), [loss for loss in losses if math.isfinite(loss)]
        style: dict[str, Any] = {"linestyle": "-" if calm else "--", "linewidth": 2.5 if lengths == found else 1.2}
        label = f"start {lengths.start}, {lengths.steps} steps" + ("" if calm else ", not calm")
        (line,) = axes.plot(
            range(1, len(finite) + 1), finite, label=label, color=plt.cm.viridis(number / len(runs)), **style
        )
        if not calm:
            axes.plot(len(finite), finite[-1], "x", color=line.get_color(), markersize=9)
    axes.set_xlabel("validation")
    axes.set_ylabel("validation loss (nats)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
