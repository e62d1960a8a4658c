"""Redraws the tables of README.md and the pictures from the rows: ``python examples/reproduce/figures.py``."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import order

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arms import ARMS
from matplotlib.ticker import LogLocator, NullFormatter
from model import RUNGS
from plan import Rows, load_rows
from results import Result, crossings, gains, results, step_shares, steps_to
from training import Run

from blockwise_lr.blocks import BlockType, lr_ratios
from blockwise_lr.tuning.statistics import interval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rows import save_figure, table

HERE = Path(__file__).parent
BASE = "adamw"
COLORS = {"adamw": "#888888", "blockwise": "#1f5fbf", "mini": "#d1671b", "embedding-head-10": "#2a9d4a"}


def _plus_minus(values: list[float], form: Callable[[float], str]) -> str:
    if not values or not all(math.isfinite(value) for value in values):
        return "not reached" if not any(math.isfinite(value) for value in values) else "not reached by every seed"
    mean, half = interval(values)
    return form(mean) + ("" if math.isnan(half) else f" ± {form(half).lstrip('+')}")


def final_table(rows: Rows) -> str:
    """Every arm of every cell: what was tried and the final losses at the best learning rate."""
    lines = []
    for cell, arms in results(rows).items():
        for arm, result in arms.items():
            finals = result.finals()
            spread = f"{max(finals) - min(finals):.3f}" if len(finals) > 1 else ""
            of = ARMS[arm].rate_of
            best = f"{of}'s" if of else "best inside" if result.inside else "best **at the edge so far**"
            tried = f"{len(result.losses)}, {best}"
            lines.append(
                [
                    cell,
                    f"{result.steps:,}",
                    arm,
                    tried,
                    f"{result.lr:g}",
                    str(len(finals)),
                    f"{np.mean(finals):.3f}",
                    spread,
                ]
            )
    return table([["cell", "steps", "arm", "rates tried", "best lr", "seeds", "final loss", "max - min"], *lines])


def _comparable(base: Result | None, other: Result | None) -> bool:
    """Whether both arms' best learning rates are found, and they share a seed there."""
    return base is not None and other is not None and base.inside and other.inside and bool(gains(base, other))


def gain_table(rows: Rows) -> str:
    """Every arm against AdamW in the same cell, where both arms' best rates have worse ones on both sides."""
    lines = []
    for cell, arms in results(rows).items():
        for arm, result in arms.items():
            if arm == BASE or not _comparable(arms.get(BASE), result):
                continue
            base = arms[BASE]
            share = "" if result.steps != base.steps else _plus_minus(step_shares(base, result), "{:.0%}".format)
            crossing = crossings(base, result)
            lines.append(
                [
                    cell,
                    f"{result.steps:,}",
                    arm,
                    str(len(gains(base, result))),
                    _plus_minus(gains(base, result), "{:+.3f}".format),
                    share,
                    "" if not crossing else "never" if math.inf in crossing else f"{np.mean(crossing):.0%}",
                ]
            )
    return table(
        [["cell", "steps", "arm", "seeds", "gain on AdamW (nats)", "steps to AdamW's loss", "below AdamW from"], *lines]
    )


def speed_table(rows: Rows) -> str:
    """How the paper counts: steps of AdamW at twice the length over the arm's own, at the arm's last loss."""
    lines = []
    for cell, arms in results(rows).items():
        twice = arms.get("adamw-twice")
        for arm, result in arms.items():
            if twice is None or arm in (BASE, "adamw-twice"):
                continue
            shared = [seed for seed in result.seeds if seed in twice.seeds]
            speed = [
                steps_to(twice.seeds[seed], result.seeds[seed]["curve"]["validation"][-1]) / result.steps
                for seed in shared
            ]
            if speed:
                lines.append([cell, arm, str(len(speed)), _plus_minus(speed, "{:.2f}".format)])
    return table([["cell", "arm", "seeds", "AdamW's steps over the arm's"], *lines]) if lines else "No rows yet."


def base_table(rows: Rows) -> str:
    """What ``adamw_lr`` makes of AdamW's best learning rate (over the FFN's ratio), beside the best that was found and what
    the mean ratio of all parameters would make of it; last, how often each is within a factor of 2."""
    lines, right = [], []
    for cell, arms in results(rows).items():
        for arm, result in arms.items():
            tuned = ARMS[arm].optimizer in ("BlockwiseAdamW", "BlockwiseAdamMini") and not ARMS[arm].rate_of
            if BASE not in arms or not tuned:
                continue
            ratios = lr_ratios(ARMS[arm].options.get("block_lr_ratios"))
            rule, by_mean = (
                arms[BASE].lr / of for of in (ratios[BlockType.FFN], _mean_ratio(ratios, cell.split("-")[0]))
            )
            found = f"{result.lr:g}" + ("" if result.inside else " at the edge so far")
            over = (rule / result.lr, by_mean / result.lr)
            lines.append([cell, arm, f"{arms[BASE].lr:g}", f"{rule:.2g}", found, *(f"{one:.2g}" for one in over)])
            if result.inside:
                right.append([0.495 < one < 2.02 for one in over])  # learning rates are rounded
    counts = [f"{sum(column)} of {len(right)}" for column in zip(*right)]
    lines.append(["within a factor of 2, best inside", *[""] * 4, *counts])
    head = ["cell", "arm", "AdamW's best lr", "`adamw_lr` gives", "best lr found", "over the best", "by the mean ratio"]
    return table([head, *lines])


def same_rate_table(rows: Rows) -> str:
    """Every arm of AdamW's family at AdamW's own best learning rate, on seed 0: what ratios alone do, nothing tuned again."""
    by_run = {Run(**row["run"]): row for row in rows.values()}
    lines = []
    for cell, arms in results(rows).items():
        if BASE not in arms or not arms[BASE].inside:
            continue
        base = next(
            run
            for run, row in by_run.items()
            if (run.cell, run.arm, row["lr"], run.seed) == (cell, BASE, arms[BASE].lr, 0)
        )
        for arm in ("blockwise", "blockwise-adamw-lr", "embedding-head-10", "found", "tuned", "mini-embedding-head-10"):
            other = by_run.get(replace(base, arm=arm))
            if other is not None and other["final"] is not None:
                lost = by_run[base]["final"]
                lines.append(
                    [
                        cell,
                        arm,
                        f"{arms[BASE].lr:g}",
                        f"{lost:.3f}",
                        f"{other['final']:.3f}",
                        f"{lost - other['final']:+.3f}",
                    ]
                )
    return table([["cell", "arm", "AdamW's best lr", "AdamW", "the arm at the same lr", "gain"], *lines])


def _mean_ratio(ratios: Mapping[BlockType | str, float], rung: str) -> float:
    """Over a rung's parameters, its norms left out, which are few."""
    of = RUNGS[rung]
    numel = {
        BlockType.EMBEDDING: of.vocabulary * of.width,
        BlockType.HEAD: of.vocabulary * of.width,
        BlockType.QK: of.layers * 2 * of.width**2,
        BlockType.VO: of.layers * 2 * of.width**2,
        BlockType.FFN: of.layers * 3 * of.width * of.ffn,
    }
    return sum(ratios[block] * count for block, count in numel.items()) / sum(numel.values())


def cost_table(rows: Rows) -> str:
    """Throughput and memory by rung, batch and arm, medians over the runs."""
    groups: dict[tuple, list] = {}
    for row in rows.values():
        run = Run(**row["run"])
        groups.setdefault((list(RUNGS).index(run.rung), run.rung, run.batch, run.arm), []).append(row)
    lines = []
    for (_, rung, batch, arm), found in sorted(groups.items()):
        lines.append(
            [
                rung,
                f"{batch // 1024}k",
                arm,
                str(len(found)),
                f"{_median(found, 'tokens_per_second'):,.0f}",
                f"{_median(found, 'peak_memory_bytes') / 2**20:.0f}",
                f"{_median(found, 'optimizer_state_bytes') / 2**20:.2f}",
            ]
        )
    return table([["rung", "batch", "arm", "runs", "tokens/s", "peak memory (MiB)", "optimizer state (MiB)"], *lines])


def _median(rows: list[dict], key: str) -> float:
    return float(np.median([row[key] for row in rows]))


def ratio_table(rows: Rows) -> str:
    """What AutoRatios has set last, at the best learning rate of each arm that has it, mean over seeds, over the FFN's."""
    blocks = ("embedding", "head", "qk", "vo", "ffn", "norm")
    lines = []
    for cell, arms in results(rows).items():
        for arm, result in arms.items():
            best = [row for row in rows.values() if row["run"]["arm"] == arm and Run(**row["run"]).cell == cell]
            last = [list(row["ratios"].values())[-1] for row in best if row["lr"] == result.lr and "ratios" in row]
            if last:
                means = {of: np.exp(np.mean([math.log(one[of] / one["ffn"]) for one in last])) for of in blocks}
                lines.append([cell, arm, f"{result.lr:g}", str(len(last)), *(f"{means[of]:.2g}" for of in blocks)])
    return table([["cell", "arm", "best lr", "seeds", *blocks], *lines])


def order_table(rows: Rows) -> str:
    """Sharpness over training; of the runs in order/, which are no rows of the plan's."""
    return order.order_table(order.load(HERE / "order"))


def tune_table(rows: Rows) -> str:
    """What `blockwise-lr tune` has found with short.py; of tune/, which has no rows of the plan's."""
    found = json.loads((HERE / "tune" / "result.json").read_text())
    blocks = list(found["best"]["block_lr_ratios"])
    lines = [
        [name, f"{one['lr']:g}", *(f"{one['block_lr_ratios'][of]:g}" for of in blocks), f"{one['loss']:.3f}"]
        for name, one in (("one rate", found["adamw"]), ("best ratios", found["best"]))
    ]
    gain = f"{found['gain'][0]:+.3f} ± {found['gain'][1]:.3f}"
    lines.append([f"gain, 2 further seeds, of {len(found['runs'])} runs", *[""] * (len(blocks) + 1), gain])
    return table([["", "lr", *blocks, "loss"], *lines])


TABLES = {
    "final": final_table,
    "gain": gain_table,
    "base": base_table,
    "same": same_rate_table,
    "speed": speed_table,
    "cost": cost_table,
    "ratios": ratio_table,
    "order": order_table,
    "tune": tune_table,
}


def with_tables(text: str, rows: Rows) -> str:
    """A page with what lies between ``<!-- rows: NAME -->`` and ``<!-- end -->`` made anew from the rows."""

    def made(match: re.Match) -> str:
        return f"<!-- rows: {match[1]} -->\n{TABLES[match[1]](rows)}\n<!-- end -->"

    return re.sub(r"<!-- rows: (\w+) -->\n.*?<!-- end -->", made, text, flags=re.S)


def _grid(cells: int) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(cells, 3)
    figure, axes = plt.subplots(
        -(-cells // columns), columns, figsize=(4.2 * columns, 3.2 * -(-cells // columns)), squeeze=False
    )
    for extra in axes.flat[cells:]:
        extra.axis("off")
    for one in axes.flat[:cells]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat[:cells])


def _log_ticks(axes: plt.Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_rates(found: dict[str, dict[str, Result]], file: Path) -> None:
    """Final loss on seed 0 over the learning rate, a panel per cell."""
    figure, axes = _grid(len(found))
    for one, (cell, arms) in zip(axes, found.items()):
        for arm, result in arms.items():
            k = [k for k in sorted(result.losses) if math.isfinite(result.losses[k])]
            one.plot(
                [1e-3 * 2 ** (i / 2) for i in k],
                [result.losses[i] for i in k],
                marker="o",
                ms=3,
                color=COLORS.get(arm),
                label=arm,
            )
        one.set(xscale="log", title=cell, xlabel="base learning rate", ylabel="final validation loss")
        _log_ticks(one)
        one.legend(frameon=False, fontsize=7)
    save_figure(figure, file)
    plt.close(figure)


def draw_curves(found: dict[str, dict[str, Result]], file: Path) -> None:
    """Validation loss over steps at the best learning rates, mean over seeds, for the arms in COLORS."""
    figure, axes = _grid(len(found))
    for one, (cell, arms) in zip(axes, found.items()):
        for arm, color in COLORS.items():
            rows = [row for row in arms[arm].seeds.values() if row["final"] is not None] if arm in arms else []
            if rows:
                one.plot(
                    rows[0]["curve"]["step"],
                    np.mean([row["curve"]["validation"] for row in rows], axis=0),
                    color=color,
                    label=f"{arm}, lr {arms[arm].lr:g}",
                )
        low = min(min(result.finals()) for arm, result in arms.items() if arm in COLORS)
        one.set(title=cell, xlabel="step", ylabel="validation loss", ylim=(low - 0.05, low + 1.0))
        one.legend(frameon=False, fontsize=7)
    save_figure(figure, file)
    plt.close(figure)


def _points(found: dict[str, dict[str, Result]], arm: str) -> dict[str, list[tuple[int, int, float, float]]]:
    """Model and budget -> (tokens of a batch, steps, mean gain on AdamW, half of its 95% interval) of each cell."""
    points: dict[str, list[tuple[int, int, float, float]]] = {}
    for arms in found.values():
        if _comparable(arms.get(BASE), arms.get(arm)):
            run = Run(**arms[BASE].seeds[0]["run"])
            mean, half = interval(gains(arms[BASE], arms[arm]))
            if math.isfinite(mean):
                points.setdefault(f"{run.rung}, {run.tokens_per_parameter:g} tokens per parameter", []).append(
                    (run.batch, arms[BASE].steps, mean, 0.0 if math.isnan(half) else half)
                )
    return points


def draw_gains(found: dict[str, dict[str, Result]], file: Path) -> None:
    """The gains of BlockwiseAdamW on AdamW over the batch and over the steps, with 95% intervals: the default's filled, the
    paper's ratios open."""
    figure, (*axes, beside) = _grid(3)
    beside.axis("off")
    of_arm = {arm: _points(found, arm) for arm in ("embedding-head-10", "blockwise")}
    names = list(dict.fromkeys(name for points in of_arm.values() for name in points))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    for one, (column, label) in zip(axes, ((0, "tokens of a batch"), (1, "steps"))):
        for arm, points in of_arm.items():
            for name, values in points.items():
                values = sorted(values, key=lambda value: value[column])
                one.errorbar(
                    *([value[place] for value in values] for place in (column, 2, 3)),
                    color=colors[name],
                    marker="o",
                    ms=4,
                    mfc=colors[name] if arm != "blockwise" else "white",
                    ls="-" if arm != "blockwise" else ":",
                    capsize=3,
                )
        one.axhline(0, color="#888888", lw=0.8, ls="--")
        one.set(xscale="log", xlabel=label, ylabel="gain on AdamW (nats)")
        _log_ticks(one)
    handles = [plt.Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles += [
        plt.Line2D([], [], color="#444444", marker="o", ms=4, label="default: embedding and head 10"),
        plt.Line2D([], [], color="#444444", marker="o", ms=4, mfc="white", ls=":", label="the paper's ratios"),
    ]
    beside.legend(handles=handles, frameon=False, fontsize=9, loc="center left")
    save_figure(figure, file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=HERE / "rows")
    parser.add_argument("--page", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    rows = load_rows(args.rows)
    args.page.write_text(with_tables(args.page.read_text(), rows))
    found = results(rows)
    if found:
        draw_rates(found, args.page.parent / "rates.png")
        draw_curves(found, args.page.parent / "curves.png")
        draw_gains(found, args.page.parent / "gain.png")
    measured = order.load(HERE / "order")
    if measured:
        order.draw(measured, args.page.parent / "order.png")
    print(f"{args.page} and its pictures, from {len(rows)} rows")


if __name__ == "__main__":
    main()
