"""What a search has found, as a table, a picture, and lines to paste."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from .search import Losses, Search, Setting


def verdict(search: Search, losses: Losses) -> str:
    """One honest sentence: what the best ratios gain over the best AdamW, and how sure that is."""
    found = search.found(losses)
    if found.adamw is None or found.best is None:
        return "Every run diverged; start from a lower --lr."
    if not search.is_adamw_found(losses):
        return (
            f"The {search.trials} runs ended before AdamW's best rate was found: so far it is {found.adamw.lr:.3g}, at the "
            f"edge of those tried, and ratios say nothing yet. Give more --trials, or begin at --lr {found.adamw.lr:.3g}."
        )
    if not search.has_other_ratios(losses):
        return (
            f"The {search.trials} runs ended before any ratios were tried; AdamW's best rate is {found.adamw.lr:.3g}. Give "
            f"more --trials."
        )
    if found.best == found.adamw:
        return f"Nothing tried is better than one learning rate of {found.adamw.lr:.3g} for all."
    by_search = losses[found.adamw] - losses[found.best]
    of_search = f"{by_search:+.4f} nats in the search itself, whose best is a minimum over noise"
    if found.gain is None:
        return (
            f"Best ratios against the best single rate: {of_search}; give more --seeds to know how much of it is noise."
        )
    mean, error = found.gain
    if math.isnan(error):
        return f"Best ratios against the best single rate: {mean:+.4f} nats with one further seed ({of_search})."
    sure = "more than the seeds differ" if mean > error else "no more than the seeds differ: it may be noise"
    return (
        f"Best ratios against the best single rate: {mean:+.4f} ± {error:.4f} nats (95%, {len(found.gains)} further seeds), "
        f"{sure} ({of_search})."
    )


def table(search: Search, losses: Losses) -> Table:
    """All runs of the search, best first."""
    found = Table(title=f"{len(losses)} runs")
    for column in ("loss", "lr", *(block.value for block in search.stated), "seed"):
        found.add_column(column, justify="right")
    for setting, loss in sorted(losses.items(), key=lambda item: item[1]):
        shown = "stopped" if math.isinf(loss) else f"{loss:.4f}"
        found.add_row(shown, f"{setting.lr:.3g}", *(f"{ratio:g}" for ratio in setting.ratios), str(setting.seed))
    return found


def to_paste(search: Search, setting: Setting) -> str:
    """The setting for a ds_config or Python, and as flags of Megatron's."""
    ratios = {name: float(f"{ratio:.4g}") for name, ratio in search.ratios(setting).items()}
    words = " ".join(f"{name}={ratio:g}" for name, ratio in ratios.items())
    return f'"lr": {setting.lr:.4g}, "block_lr_ratios": {json.dumps(ratios)}\n--lr {setting.lr:.4g} --block-lr-ratios {words}'


def as_json(search: Search, losses: Losses) -> str:
    """Runs, the best and the gain."""
    found = search.found(losses)

    def plain(setting: Setting | None) -> dict[str, Any] | None:
        if setting is None:
            return None
        loss = losses[setting]
        return {
            "lr": setting.lr,
            "block_lr_ratios": search.ratios(setting),
            "seed": setting.seed,
            "loss": loss if math.isfinite(loss) else None,
        }

    runs = [plain(setting) for setting in sorted(losses, key=lambda setting: losses[setting])]
    gain = None if found.gain is None else [value if math.isfinite(value) else None for value in found.gain]
    return json.dumps({"adamw": plain(found.adamw), "best": plain(found.best), "gain": gain, "runs": runs}, indent=1)


def draw(search: Search, losses: Losses, file: Path) -> None:
    """The loss over the learning rate (all ratios 1, and the best ratios), and over each ratio around the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = search.found(losses)
    if found.best is None or found.adamw is None:
        return
    tried = search.has_other_ratios(losses)
    panels = (len(search.blocks) if tried else 0) + 1
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.6 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[panels:]:
        axis.remove()
    drawn = [(found.adamw, "one rate", "o"), (found.best, "best ratios", "s")]
    for setting, label, marker in drawn if tried else drawn[:1]:
        same = {s.lr: loss for s, loss in losses.items() if s.seed == 0 and s.ratios == setting.ratios}
        _line(flat[0], same, label, marker)
    flat[0].set_xlabel("base learning rate")
    flat[0].legend(fontsize=8)
    for number, block in enumerate(search.blocks if tried else ()):
        near = {
            s.ratios[number]: loss
            for s, loss in losses.items()
            if s.seed == 0 and replace(s, ratios=_with(s, number, found.best)) == found.best
        }
        _line(flat[number + 1], near, block.value, "s")
        flat[number + 1].axvline(found.best.ratios[number], color="0.8", zorder=0)
        flat[number + 1].set_xlabel(f"ratio of {block.value}")
    low = min((axis.get_ylim()[0] for axis in flat[1:panels]), default=0.0)
    high = max((axis.get_ylim()[1] for axis in flat[1:panels]), default=1.0)
    for axis in flat[1:panels]:  # so that a ratio that matters looks as if
        axis.set_ylim(low, high)
    for row in axes:
        row[0].set_ylabel("loss (nats)")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _with(setting: Setting, number: int, of: Setting) -> tuple[float, ...]:
    ratios = list(setting.ratios)
    ratios[number] = of.ratios[number]
    return tuple(ratios)


def _line(axis: Any, losses: dict[float, float], label: str, marker: str) -> None:
    points = sorted((place, loss) for place, loss in losses.items() if math.isfinite(loss))
    axis.plot([place for place, _ in points], [loss for _, loss in points], marker=marker, label=label)
    axis.set_xscale("log", base=2)
