"""Does a sequence length warmup let a model train at rates where it otherwise spikes? The case of arXiv 2108.06084, small.

python examples/sequence_length/run.py                  # what make seqlen-demo runs: 54 short runs, tables and pictures
python examples/sequence_length/run.py --form unclipped # without gradient clipping
python examples/sequence_length/run.py --form long      # larger and longer
python examples/sequence_length/run.py --report         # only the tables of README.md and the picture, from rows/
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from train import ARMS, FORMS, LENGTH, Run, Text, train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Rows = dict[Run, dict]
DRAWN = ("short", "unclipped")  # in README.md


def runs_of(form: str) -> list[Run]:
    """All runs of a form."""
    of = FORMS[form]
    return [Run(form, arm, lr, seed) for seed in range(of.seeds) for lr in of.lrs for arm in ARMS]


def load(folder: Path) -> Rows:
    """The rows of a folder."""
    rows = (json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))
    return {Run(**row["run"]): row for row in rows}


def of_setting(rows: Rows, form: str, arm: str, lr: float) -> list[dict]:
    """The seeds of a setting."""
    found = {run.seed: row for run, row in rows.items() if (run.form, run.arm, run.lr) == (form, arm, lr)}
    return [found[seed] for seed in sorted(found)]


def share_of_time(base: dict, other: dict) -> float:
    """The time after which a run has reached another one's last validation loss, over that one's; infinite: never."""
    if base["final"] is None:
        return math.nan
    curve = other["curve"]
    points = zip(curve["seconds"], curve["validation"])
    reached = (seconds for seconds, loss in points if loss is not None and loss <= base["final"])
    return next(reached, math.inf) / base["curve"]["seconds"][-1]


def table(rows: Rows, form: str) -> str:
    """A line for each learning rate and arm; means over the seeds."""
    head = [
        "lr",
        "arm",
        "seeds",
        "validation loss",
        "max - min",
        "spikes",
        "largest loss ratio",
        "time to the other's loss",
    ]
    lines = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for lr in FORMS[form].lrs:
        base = of_setting(rows, form, ARMS[0], lr)
        for arm in ARMS:
            found = of_setting(rows, form, arm, lr)
            if not found:
                continue
            finals = [math.inf if row["final"] is None else row["final"] for row in found]
            largest = max(math.inf if row["largest_ratio"] is None else row["largest_ratio"] for row in found)
            shares = [] if arm == ARMS[0] else [share_of_time(one, other) for one, other in zip(base, found)]
            spread = max(finals) - min(finals)
            lines.append(
                [
                    f"{lr:g}",
                    arm,
                    str(len(found)),
                    f"{np.mean(finals):.3f}" if math.isfinite(sum(finals)) else "diverged",
                    f"{spread:.3f}" if math.isfinite(spread) else "",
                    f"{np.mean([row['spikes'] for row in found]):.1f}",
                    f"{largest:.2f}",
                    ""
                    if not shares
                    else f"{np.mean(shares):.0%}"
                    if math.isfinite(sum(shares))
                    else "not by every seed",
                ]
            )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def correlations(rows: Rows, form: str) -> str:
    """Of the loss ratio with the optimizer's variance over the steps, the mean of each arm's runs."""
    lines = [["arm", "runs", "with the l1 norm of the variance", "with its maximum"], ["---", "--:", "--:", "--:"]]
    for arm in ARMS:
        found = [row["correlation"] for run, row in rows.items() if (run.form, run.arm) == (form, arm)]
        found = [one for one in found if None not in one.values()]
        if found:
            means = [f"{np.mean([one[key] for one in found]):+.2f}" for key in ("norm", "max")]
            lines.append([arm, str(len(found)), *means])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(rows: Rows, form: str, file: Path) -> None:
    """Validation loss over tokens for the three largest rates, and the last loss over all rates."""
    lrs = FORMS[form].lrs
    figure, axes = plt.subplots(1, min(len(lrs), 3) + 1, figsize=(14, 3.4))
    for axis, lr in zip(axes, lrs[-3:]):
        for arm, color in zip(ARMS, ("#888888", "#1f5fbf")):
            for number, row in enumerate(of_setting(rows, form, arm, lr)):
                losses = [math.nan if loss is None else loss for loss in row["curve"]["validation"]]
                label = arm if number == 0 else None
                axis.plot(row["curve"]["tokens"], losses, color=color, lw=1.1, label=label)
        axis.set(title=f"lr {lr:g}", xlabel="tokens")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(5, 5))
    last = axes[-1]
    for arm, color, marker in zip(ARMS, ("#888888", "#1f5fbf"), "os"):
        found = [[row["final"] for row in of_setting(rows, form, arm, lr) if row["final"] is not None] for lr in lrs]
        points = [(lr, np.mean(of), np.ptp(of) / 2) for lr, of in zip(lrs, found) if of]
        last.errorbar(*zip(*points), color=color, marker=marker, ms=4, capsize=3, label=arm)
    last.set(xscale="log", xlabel="learning rate", title="after the same tokens")
    axes[0].set_ylabel(f"validation loss at {LENGTH} tokens")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=90, metadata={"Software": None})
    plt.close(figure)


TABLES = {"table": table, "correlations": correlations}


def with_tables(text: str, rows: Rows) -> str:
    """A page with what lies between ``<!-- slw: TABLE FORM -->`` and ``<!-- end -->`` made anew."""

    def made(match: re.Match) -> str:
        return f"<!-- slw: {match[1]} {match[2]} -->\n{TABLES[match[1]](rows, match[2])}\n<!-- end -->"

    return re.sub(r"<!-- slw: (\w+) (\w+) -->\n.*?<!-- end -->", made, text, flags=re.S)


def _train(given: tuple[Run, Path, Path]) -> Run:
    run, text, folder = given
    row = train(run, Text(text, "0.3M", LENGTH))
    (folder / f"{run.key}.json").write_text(json.dumps(row) + "\n")
    return run


def train_all(form: str, folder: Path, jobs: int, text: Path) -> None:
    """Runs what the folder lacks, some at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs_of(form) if run not in load(folder)]
    Text(text, "0.3M", LENGTH)  # made once, before the processes share it
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, run in enumerate(pool.imap_unordered(_train, [(run, text, folder) for run in missing]), 1):
            left = (time.monotonic() - began) / done * (len(missing) - done)
            print(f"{run.key}: {done} of {len(missing)}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", nargs="+", choices=list(FORMS), default=["short", "unclipped"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sequence_length", help="rows, table and picture")
    parser.add_argument(
        "--text", type=Path, default=ROOT / "runs" / "reproduce", help="folder of token ids, made there once"
    )
    parser.add_argument("--report", action="store_true", help="only README.md and its picture, from rows/")
    args = parser.parse_args()
    if args.report:
        rows, page = load(HERE / "rows"), HERE / "README.md"
        page.write_text(with_tables(page.read_text(), rows))
        for form in DRAWN:
            draw(rows, form, HERE / f"{form}.png")
        return
    for form in args.form:
        train_all(form, args.out, args.jobs, args.text)
        rows, picture = load(args.out), args.out / f"{form}.png"
        draw(rows, form, picture)
        print(f"{form}:", table(rows, form), correlations(rows, form), f"picture: {picture}\n", sep="\n\n")


if __name__ == "__main__":
    main()
