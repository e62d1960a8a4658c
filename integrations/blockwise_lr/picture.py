"""A picture of a model, coloured by block type: what ``blockwise-lr inspect --format svg`` writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .inspection import Row, totals

# One hue per block type, darker for a higher learning rate in the paper's ratios; red is for unmapped parameters.
COLORS = {
    "embedding": "#1d4e89",
    "head": "#5b7fb4",
    "qk": "#00798c",
    "ffn": "#3fa34d",
    "vo": "#e6a117",
    "norm": "#b5b5b5",
    "router": "#8e5ea2",
    "ssm": "#c97b63",
    "UNMAPPED": "#d7263d",
}
_OWN = ("#2a9d8f", "#e76f51", "#264653", "#f4a261", "#9d4edd", "#6a994e")  # blocks of the user's own, in turn
_LAYER = re.compile(r"(.*?\.\d+)\.")


def bars(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Module -> block type -> elements: one entry per layer, and one per module outside the layers, in model order."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        layer = _LAYER.match(row.parameter)
        label = layer.group(1) if layer else row.parameter.removesuffix(".weight").removesuffix(".bias")
        counts = found.setdefault(label, {})
        counts[row.block] = counts.get(row.block, 0) + row.numel
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a stacked bar chart: one bar per layer, its length in parameters, split into block types.

    The legend shows the peak learning rate and the size of each block type.

    Args:
        rows: the table of ``blockwise-lr inspect``.
        path: the file to write; its suffix selects the format (svg, png).

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    modules, sizes = bars(rows), totals(list(rows))
    lrs: dict[str, float] = {}
    for row in rows:  # rules may scale a block by layer
        lrs[row.block] = max(row.peak_lr, lrs.get(row.block, 0.0))
    own = [block for block in sizes if block not in COLORS]
    colors = {**COLORS, **{block: _OWN[number % len(_OWN)] for number, block in enumerate(own)}}
    figure = Figure(figsize=(9, 1.6 + 0.22 * len(modules)), layout="constrained")
    axes = figure.subplots()
    order = sorted(sizes, key=lambda block: -lrs[block])
    for position, counts in enumerate(modules.values()):
        left = 0
        for block in order:
            axes.barh(position, counts.get(block, 0) / 1e6, left=left / 1e6, height=0.8, color=colors[block])
            left += counts.get(block, 0)
    for block in order:
        axes.barh(0, 0, color=colors[block], label=f"{block}: lr {lrs[block]:.3g}, {sizes[block] / 1e6:,.1f}M")
    axes.set_yticks(range(len(modules)), list(modules), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("million parameters")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
