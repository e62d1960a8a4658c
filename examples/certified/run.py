"""Training to certified robustness by interval bounds with a short warmup of epsilon: arXiv 2103.17268, small.

python examples/certified/run.py                                    # what make certified runs; rows in runs/certified
python examples/certified/run.py --setting cifar10 --data FOLDER    # the paper's settings, CIFAR-10's binary version
python examples/certified/run.py --arm all --ratio conv=2           # rates by block, over the learning rate of 5e-4
python examples/certified/run.py --report                           # only README.md's tables and picture, from rows/

Start it twice for two cores. With --checkpoints it saves after every epoch and goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from train import ARMS, SETTINGS, Run, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images import load
from rows import Rows, fill, load_rows, save_figure, table, write_page

HERE = Path(__file__).parent
COLORS = dict(zip(ARMS, ("#888888", "#d1671b", "#2a9d4a", "#1f5fbf")))


def runs_of(setting: str, arms: list[str], ratios: tuple[tuple[str, float], ...], rows: Rows) -> list[Run]:
    """All runs, seed by seed."""
    return [Run(setting, arm, seed, ratios) for seed in range(SETTINGS[setting].seeds) for arm in arms]


def of_arm(rows: Rows, setting: str, arm: str) -> list[dict]:
    """The seeds of an arm."""
    keys = [Run(setting, arm, seed).key for seed in range(SETTINGS[setting].seeds)]
    return [rows[key] for key in keys if key in rows]


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def errors(rows: Rows, setting: str) -> str:
    """A line for each arm: errors in percent, mean and standard deviation over the seeds."""
    lines = [
        ["arm", "seeds", "standard error", "verified error", "of each seed", "lowest while training", "CPU seconds"]
    ]
    for arm in ARMS:
        found = of_arm(rows, setting, arm)
        if not found:
            continue
        verified = [100 * row["verified"] for row in found]
        lines.append(
            [
                arm,
                str(len(found)),
                _spread([100 * row["error"] for row in found]),
                _spread(verified),
                ", ".join(f"{value:.1f}" for value in verified),
                _spread([100 * min(row["curve"]["verified"]) for row in found]),
                f"{np.mean([row['cpu_seconds'] for row in found]):.0f}",
            ]
        )
    return table(lines)


def _points(row: dict, setting: str) -> list[tuple[str, dict]]:
    """At the start, at the end of the warmup, and at the end: what was recorded of the bounds."""
    of, curve = SETTINGS[setting], row["curve"]
    ends = {"start": None, "end of warmup": of.clean + of.grows - 1, "end": -1}
    return [
        (when, row["start"] if at is None else {key: curve[key][at] for key in ("growth", "active", "inactive")})
        for when, at in ends.items()
    ]


def by_layer(rows: Rows, setting: str, what: str) -> str:
    """Per arm, time and hidden layer, means over the seeds: of the bounds' growth or of the shares of active ReLUs."""
    lines = [["arm", "when", *(f"ReLU {number}" for number in range(1, 7))]]
    for arm in ARMS:
        found = of_arm(rows, setting, arm)
        for number, (when, _) in enumerate(_points(found[0], setting) if found else ()):
            of = np.array([_points(row, setting)[number][1][what] for row in found])
            if what == "growth":
                cells = [f"{value:.3g}" for value in np.exp(np.log(of).mean(0))]
            else:
                cells = [f"{100 * value:.0f}" for value in of.mean(0)]
            lines.append([arm, when, *cells])
    return table(lines)


def draw(rows: Rows, setting: str, file: Path) -> None:
    """Errors over epochs, the last hidden layer's growth, and its share of active ReLUs, every seed."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    for arm in ARMS:
        for number, row in enumerate(of_arm(rows, setting, arm)):
            curve, label = row["curve"], arm if number == 0 else None
            lines = (
                [100 * value for value in curve["verified"]],
                [100 * value for value in curve["error"]],
                [values[-1] for values in curve["growth"]],
                [100 * float(np.mean(values)) for values in curve["active"]],
            )
            for axis, values in zip(axes, lines):
                axis.plot(curve["epoch"], values, color=COLORS[arm], lw=1.1, label=label)
    titles = ("verified error, %", "standard error, %", "growth of the bounds to ReLU 6", "always active ReLUs, %")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="epoch")
        axis.axvline(SETTINGS[setting].clean + SETTINGS[setting].grows, color="#bbbbbb", lw=0.8, ls=":")
    axes[2].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, file)
    plt.close(figure)


def tables(rows: Rows, setting: str) -> dict[str, str]:
    """The page's tables."""
    return {
        "errors": errors(rows, setting),
        "growth": by_layer(rows, setting, "growth"),
        "active": by_layer(rows, setting, "active"),
    }


def ratio_of(word: str) -> tuple[str, float]:
    """``conv=2``."""
    block, _, ratio = word.partition("=")
    if block not in ("conv", "norms", "linear") or not ratio:
        raise argparse.ArgumentTypeError(f"{word} is no ratio; write one of conv, norms and linear, as in conv=2")
    return block, float(ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="small")
    parser.add_argument("--arm", choices=list(ARMS), action="append", help="only this one; may be repeated")
    parser.add_argument("--ratio", type=ratio_of, action="append", default=[], help="learning rate of a block over lr")
    parser.add_argument("--data", type=Path, help="folder of MNIST's or CIFAR-10's files")
    parser.add_argument("--checkpoints", type=Path, help="folder to save to after every epoch, and to go on from")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "certified", help="rows and picture")
    parser.add_argument("--report", action="store_true", help="only README.md and its picture, from rows/")
    args = parser.parse_args()
    if args.report:
        rows = load_rows(HERE / "rows")
        write_page(HERE / "README.md", tables(rows, "small"))
        draw(rows, "small", HERE / "curves.png")
        return
    torch.set_num_threads(1)
    data, ratios = load(SETTINGS[args.setting].source, args.data), tuple(sorted(args.ratio))
    wanted = partial(runs_of, args.setting, args.arm or list(ARMS), ratios)
    fill(wanted, lambda run: train(run, data, args.checkpoints), args.out)
    rows = load_rows(args.out)
    if ratios:
        found = [(run.key, rows[run.key]) for run in wanted(rows) if run.key in rows]
        lines = [[key, f"{row['error']:.1%}", f"{row['verified']:.1%}"] for key, row in found]
        print(table([["run", "standard error", "verified error"], *lines]))
        return
    draw(rows, args.setting, args.out / "curves.png")
    print(*tables(rows, args.setting).values(), f"picture: {args.out / 'curves.png'}", sep="\n\n")


if __name__ == "__main__":
    main()
