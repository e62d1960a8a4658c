"""The pictures of a report, as SVG: small, so that a telephone shows one in its width and a desk two side by side."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arms import Arm, smoothed
from .names import LOSS, LOSS_RATIOS, RATE, SHARPNESS, SHARPNESS_ERROR, VALIDATION, blocks_of
from .runs import Series
from .summary import Report, costs_of, size

MOST = 8  # lines of a picture
_WIDTH, _HEIGHT = 4.6, 3.1  # inches


@dataclass(frozen=True)
class Style:
    """What tells a line from others without its colour too: dashes, and the shape of its marks."""

    color: str
    dash: tuple[float, ...]
    marker: str


# colours of Okabe and Ito, from dark to light in grey
STYLES = (
    Style("#000000", (), "o"),
    Style("#0072B2", (6, 2), "s"),
    Style("#D55E00", (2, 1.5), "^"),
    Style("#009E73", (7, 2, 1.5, 2), "D"),
    Style("#8A4F7D", (4, 1.5), "v"),
    Style("#56B4E9", (), "x"),
    Style("#A67C00", (1, 1), "P"),
    Style("#777777", (9, 3), "*"),
)
_BLOCK_STYLES = {
    "embedding": STYLES[1],
    "head": replace(STYLES[5], dash=(3, 1.5), marker="x"),
    "qk": STYLES[2],
    "vo": STYLES[3],
    "ffn": STYLES[4],
    "norm": STYLES[0],
    "router": STYLES[6],
    "ssm": STYLES[7],
}


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        errors: half widths of a band around it.
        is_faint: a single seed beside the mean.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Style
    errors: np.ndarray | None = None
    is_faint: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG, what is said under it, and what its lines are."""

    title: str
    svg: str
    legend: tuple[tuple[str, Style], ...] = ()
    caption: str = ""


def pictures_of(report: Report) -> dict[str, list[Picture]]:
    """Section -> its pictures; none for what no run has.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = {
        "Losses": _losses(report),
        "Learning rates": _by_block(report, RATE, "learning rate"),
        "Sharpness": _by_block(report, f"blocks/{SHARPNESS}", "trace / parameters"),
        "Block figures": [
            picture for kind, title in _TITLES.items() for picture in _by_block(report, f"blocks/{kind}", kind, title)
        ]
        + _loss_ratios(report),
        "Memory and throughput": _costs(report),
    }
    return {section: pictures for section, pictures in found.items() if pictures}


# of BlockMonitor's figures, in the order of the page
_TITLES = {
    "gradient_norm": "norm of the gradients",
    "update_to_weight": "update over weight",
    "update_rms": "root mean square of the update",
    "weight_rms": "root mean square of the weights",
    "variance_l1": "sum of second moments",
    "variance_max": "largest second moment",
}


def _losses(report: Report) -> list[Picture]:
    pictures = []
    for name, title in ((VALIDATION, "validation loss"), (LOSS, "training loss")):
        arms = [arm for arm in report.arms if arm.with_figure(name)]
        shown, lines, legend = arms[:MOST], [], []
        for arm, style in zip(shown, STYLES):
            mean = arm.mean(name)
            assert mean is not None
            lines.append(_line(arm.name, smoothed(mean) if name == LOSS else mean, style))
            legend.append((arm.name, style))
            runs = arm.with_figure(name) if len(arm.runs) > 1 and name == VALIDATION else []
            lines += [replace(_line("", run.series[name], style), is_faint=True) for run in runs]
        if lines:
            said = f"The first {MOST} of {len(arms)} runs. " if len(arms) > MOST else ""
            said += "Thin: single seeds. " if any(line.is_faint for line in lines) else ""
            said += "Mean of the last 5% of points at each. " if name == LOSS else ""
            svg = _draw(lines, report.unit, title, top=_top(lines))
            pictures.append(Picture(f"{title} over {report.unit}", svg, tuple(legend), said + "The start is cut off."))
        timed = [(arm, _over_time(arm, name)) for arm in shown]
        lines = [
            _line(arm.name, smoothed(one) if name == LOSS else one, style)
            for (arm, one), style in zip(timed, STYLES)
            if one is not None
        ]
        if len(lines) > 1:
            unit, per = _time_unit(max(float(line.x[-1]) for line in lines))
            lines = [replace(line, x=line.x / per) for line in lines]
            svg = _draw(lines, unit, title, top=_top(lines))
            pictures.append(Picture(f"{title} over time", svg, tuple(legend), "First seed; the start is cut off."))
    return pictures


def _over_time(arm: Arm, name: str) -> Series | None:
    """Of its first run, seconds in the place of steps."""
    run = arm.with_figure(name)[0]
    series = run.series[name]
    seconds = [run.seconds_at(name, float(step)) for step in series.steps]
    if any(second is None for second in seconds):
        return None
    return Series(np.array(seconds, dtype=float), series.values)


def _time_unit(longest: float) -> tuple[str, float]:
    return next(
        ((unit, per) for unit, per in (("hours", 3600.0), ("minutes", 60.0)) if longest > 2 * per), ("seconds", 1.0)
    )


def _top(lines: Sequence[Line]) -> float | None:
    """The highest loss to show: what runs have left behind after a tenth of their length."""
    later = [line.y[(line.x >= line.x[0] + 0.1 * (line.x[-1] - line.x[0])) & np.isfinite(line.y)] for line in lines]
    values = np.concatenate(later)
    if len(values) < 4:
        return None
    low, high = float(values.min()), float(values.max())
    return high + 0.05 * (high - low) if high > low else None


def _by_block(report: Report, prefix: str, label: str, title: str = "") -> list[Picture]:
    """A picture per arm, all with the same scale: its block types."""
    found = [(arm, lines) for arm in report.arms if (lines := _block_lines(arm, prefix))]
    values = [line.y[np.isfinite(line.y) & (line.y > 0)] for _, lines in found for line in lines]
    positive = np.concatenate(values) if values else np.array([])
    limits = (float(positive.min()) / 1.3, float(positive.max()) * 1.3) if len(positive) else None
    pictures = []
    for arm, lines in found[:MOST]:
        svg = _draw(lines, report.unit, label, is_log=limits is not None, limits=limits)
        named = f"{title}, {arm.name}" if title and len(report.arms) > 1 else title or arm.name
        pictures.append(Picture(named, svg, tuple((line.label, line.style) for line in lines)))
    return pictures


def _block_lines(arm: Arm, prefix: str) -> list[Line]:
    names = sorted({name for run in arm.runs for name in run.series})
    lines = []
    for number, block in enumerate(blocks_of(names, prefix)):
        style = _BLOCK_STYLES.get(block, STYLES[(number + 5) % len(STYLES)])
        mean = arm.mean(f"{prefix}/{block}")
        error = arm.mean(f"blocks/{SHARPNESS_ERROR}/{block}") if prefix.endswith(SHARPNESS) else None
        assert mean is not None
        errors = None if error is None or len(error.values) != len(mean.values) else error.values
        lines.append(replace(_line(block, mean, style), errors=errors))
    if not lines and prefix == RATE and (single := arm.mean(RATE)) is not None:
        lines.append(_line("one for all", single, STYLES[0]))
    return lines


def _loss_ratios(report: Report) -> list[Picture]:
    pictures = []
    for kind in LOSS_RATIOS:
        series = [(arm, arm.mean(f"blocks/{kind}")) for arm in report.arms]
        lines = [_line(arm.name, one, style) for (arm, one), style in zip(series, STYLES) if one is not None]
        if lines:
            legend = tuple((line.label, line.style) for line in lines)
            pictures.append(Picture(kind, _draw(lines, report.unit, kind), legend))
    return pictures


def _costs(report: Report) -> list[Picture]:
    pictures = []
    for column in ("tokens/s", "samples/s", "peak memory", "optimizer state a rank"):
        bars = []
        for arm in report.arms[: 2 * MOST]:
            known = [cost[column] for run in arm.runs if column in (cost := costs_of(run))]
            if known:
                bars.append((arm.name, float(np.mean(known))))
        if len(bars) > 1:
            shown = size if "/" not in column else lambda value: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
            pictures.append(Picture(column, _bars([(name, value, shown(value)) for name, value in bars])))
    return pictures


def _line(label: str, series: Series, style: Style) -> Line:
    return Line(label, series.steps, series.values, style)


# ---- drawing


def _figure(height: float = _HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return figure, axes


def _draw(
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    *,
    is_log: bool = False,
    top: float | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    figure, axes = _figure()
    for number, line in enumerate(lines):
        style = line.style
        if is_log:
            line = replace(line, y=np.where(line.y > 0, line.y, np.nan))
        every = (
            (number * 0.03 + 0.02, 0.19) if len(line.x) > 12 else None
        )  # marks of lines that lie together take turns
        axes.plot(
            line.x,
            line.y,
            color=style.color,
            dashes=style.dash or (1, 0),
            lw=0.6 if line.is_faint else 1.5,
            alpha=0.55 if line.is_faint else 1.0,
            marker="" if line.is_faint else style.marker,
            ms=4,
            markevery=every,
        )
        if line.errors is not None:
            axes.fill_between(line.x, line.y - line.errors, line.y + line.errors, color=style.color, alpha=0.15, lw=0)
    if is_log:
        axes.set_yscale("log")
    if limits is not None:
        axes.set_ylim(*limits)
    if top is not None:
        axes.set_ylim(top=top)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel.replace("_", " "), fontsize=9)
    axes.xaxis.set_major_formatter(_thousands)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    return _svg(figure, "".join((xlabel, ylabel, *(line.label for line in lines))))


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _bars(bars: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal ones with their numbers, labels above each, so that long names find room."""
    figure, axes = _figure(0.5 + 0.42 * len(bars))
    largest = max(value for _, value, _ in bars)
    for place, (name, value, shown) in enumerate(bars):
        axes.barh(place, value, height=0.38, color="#0072B2")
        axes.text(0, place - 0.24, _cut(name), fontsize=8.5, va="bottom")
        axes.text(value + 0.01 * largest, place, shown, fontsize=8.5, va="center")
    axes.set_ylim(len(bars) - 0.6, -0.8)
    axes.set_xlim(0, 1.28 * largest)
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    return _svg(figure, "".join(name for name, _, _ in bars))


def _cut(name: str, most: int = 56) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _svg(figure: Any, salt: str) -> str:
    """The figure's SVG element alone, with ids that no other picture of the page has, and no size of its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return text.strip()


def with_own_ids(svg: str, prefix: str) -> str:
    """An SVG whose ids begin with a prefix, for a page with several."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}')
    return svg.replace("url(#", f"url(#{prefix}")
