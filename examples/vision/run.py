"""Does a vision transformer gain from the paper's ratios? Each optimizer at the best of as many learning rates, three seeds.

python examples/vision/run.py             # what make vision runs: trains what runs/vision lacks, a table and a picture
python examples/vision/run.py --arm muon  # one optimizer alone
python examples/vision/run.py --report    # only the tables of README.md and its picture, from rows/

Start it twice for two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from train import ARMS, SETTINGS, Run, learning_rates, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images import load
from rows import Rows, fill, load_rows, save_figure, table, write_page

HERE = Path(__file__).parent
NAMES = {name: kind for name, (kind, _, _) in ARMS.items()}
COLORS = dict(zip(ARMS, ("#888888", "#1f5fbf", "#d1671b", "#2a9d4a", "#b02a5b")))
BLOCKS = ("embedding", "head", "qk", "ffn", "vo", "norm")


def final(row: dict) -> float:
    """Validation loss; infinite where the run diverged."""
    return math.inf if row["final"] is None else row["final"]


def trials(rows: Rows, setting: str, arm: str) -> dict[float, dict]:
    """The rows of seed 0 by learning rate."""
    keys = {lr: Run(setting, arm, lr, 0).key for lr in learning_rates(setting, arm)}
    return {lr: rows[key] for lr, key in keys.items() if key in rows}


def best(rows: Rows, setting: str, arm: str) -> float:
    """The learning rate with the lowest validation loss."""
    tried = trials(rows, setting, arm)
    return min(tried, key=lambda lr: final(tried[lr]))


def at_best(rows: Rows, setting: str, arm: str) -> list[dict]:
    """The rows at the best learning rate, by seed."""
    lr = best(rows, setting, arm)
    keys = [Run(setting, arm, lr, seed).key for seed in range(SETTINGS[setting].seeds)]
    return [rows[key] for key in keys if key in rows]


def wanted(setting: str, arms: list[str], rows: Rows) -> list[Run]:
    """All learning rates on seed 0, then the other seeds at the best."""
    found: list[Run] = []
    for arm in arms:
        lrs = learning_rates(setting, arm)
        if len(trials(rows, setting, arm)) < len(lrs):
            found += [Run(setting, arm, lr, 0) for lr in lrs]
        else:
            lr = best(rows, setting, arm)
            found += [Run(setting, arm, lr, seed) for seed in range(1, SETTINGS[setting].seeds)]
    return found


def results(rows: Rows, setting: str) -> str:
    """A line for each arm: its best learning rate, and what the seeds there came to."""
    head = ["arm", "optimizer", "lr", "of so many", "validation loss", "of each seed", "errors", "CPU seconds"]
    lines = [head]
    for arm in ARMS:
        if not trials(rows, setting, arm):
            continue
        tried, found = trials(rows, setting, arm), at_best(rows, setting, arm)
        lr = best(rows, setting, arm)
        edge = len(tried) > 1 and lr in (min(tried), max(tried))
        finals = [final(row) for row in found]
        lines.append(
            [
                arm,
                NAMES[arm],
                f"{lr:g}" + (" (at the edge)" if edge else ""),
                str(len(tried)),
                f"{np.mean(finals):.4f}",
                ", ".join(f"{loss:.4f}" for loss in finals),
                f"{np.mean([row['error'] for row in found]):.1%}",
                f"{np.mean([row['cpu_seconds'] for row in found]):.0f}",
            ]
        )
    return table(lines)


def tried_rates(rows: Rows, setting: str) -> str:
    """Validation loss of seed 0 at every learning rate."""
    lines = [["arm", *(f"{number + 1}" for number in range(SETTINGS[setting].trials))]]
    for arm in ARMS:
        tried = trials(rows, setting, arm)
        if tried:
            lines.append([arm, *(f"{final(row):.3f} ({lr:g})" for lr, row in sorted(tried.items()))])
    return table(lines)


def sharpness(rows: Rows, setting: str) -> str:
    """What was measured in AdamW's run at its best rate: sharpness by block type, with its standard error."""
    lines = [["step", *BLOCKS, "from flat to sharp"]]
    for point in at_best(rows, setting, "adamw")[0].get("measured", ()):
        of = point["sharpness"]
        cells = [f"{of['blocks'][b]['sharpness']:.1e} ± {of['blocks'][b]['error']:.0e}" for b in BLOCKS]
        lines.append([str(point["step"]), *cells, " < ".join(" ~ ".join(level) for level in of["order"])])
    return table(lines)


def draw(rows: Rows, setting: str, file: Path) -> None:
    """Validation loss of seed 0 over the learning rate, and over steps at the best."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for arm in ARMS:
        tried = trials(rows, setting, arm)
        if not tried:
            continue
        points = sorted((lr, final(row)) for lr, row in tried.items())
        left.plot(*zip(*points), "o-", ms=4, lw=1.1, color=COLORS[arm], label=arm)
        for row in at_best(rows, setting, arm):
            right.plot(row["curve"]["step"], row["curve"]["validation"], lw=1.1, color=COLORS[arm])
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss", title="every trial, seed 0")
    right.set(xlabel="step", title="every seed at the best rate", yscale="log")
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, file)
    plt.close(figure)


def tables(rows: Rows, setting: str) -> dict[str, str]:
    """The page's tables."""
    return {
        "results": results(rows, setting),
        "rates": tried_rates(rows, setting),
        "sharpness": sharpness(rows, setting),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="small")
    parser.add_argument("--arm", choices=list(ARMS), action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "vision", help="rows and picture")
    parser.add_argument("--report", action="store_true", help="only README.md and its picture, from rows/")
    args = parser.parse_args()
    if args.report:
        rows = load_rows(HERE / "rows")
        write_page(HERE / "README.md", tables(rows, "small"))
        draw(rows, "small", HERE / "curves.png")
        return
    torch.set_num_threads(1)
    data = load("mnist-5k")
    arms = args.arm or list(ARMS)
    fill(partial(wanted, args.setting, arms), lambda run: train(run, data, run.seed == 0), args.out)
    rows = load_rows(args.out)
    draw(rows, args.setting, args.out / "curves.png")
    print(results(rows, args.setting), f"picture: {args.out / 'curves.png'}", sep="\n\n")


if __name__ == "__main__":
    main()
