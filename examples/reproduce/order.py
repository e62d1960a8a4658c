"""Sharpness and updates of each block type over a training run: ``python examples/reproduce/order.py run --rung 0.3M``.

AdamW at one learning rate on the ladder's text, measured at steps 0, 100, 300, 1000 and 3000 as `blockwise-lr sharpness` does,
and as measure_updates does for the step that follows. One JSON file per run in order/; ``... order.py draw`` draws them all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from arms import learning_rate
from data import Text
from model import body_parameters
from training import Place, Run, Training, commit, machine, predictions, versions

from blockwise_lr import map_blocks
from blockwise_lr.measure import measure_sharpness, measure_updates, snapshot

HERE = Path(__file__).parent
AT = (0, 100, 300, 1000, 3000)
BATCHES, SEQUENCES, DRAWS = 8, 16, 4  # 16k tokens a point, 32 draws
# arXiv 2502.19002, LLaMA 0.25B on OpenWebText with AdamW, 50k steps: embedding, QK, FFN, VO, norm; read off its figure, ±5%
PAPER = {
    0: (1.9e-6, 8.1e-7, 5.0e-6, 1.5e-5, 9.6e-6),
    100: (1.2e-6, 3.9e-7, 1.3e-6, 4.0e-6, 3.3e-6),
    1000: (1.2e-6, 2.5e-6, 3.6e-6, 5.0e-6, 7.3e-6),
    10000: (5.3e-7, 1.2e-6, 1.7e-6, 3.0e-6, 1.9e-5),
    20000: (5.6e-7, 1.2e-6, 1.9e-6, 3.5e-6, 2.6e-5),
    40000: (8.6e-7, 1.5e-6, 2.9e-6, 5.5e-6, 3.1e-5),
}
COLORS = {
    "embedding": "#2a9d4a",
    "head": "#8fc97e",
    "qk": "#1f5fbf",
    "ffn": "#d1671b",
    "vo": "#b02a5b",
    "norm": "#555555",
}


def measure(rung: str, k: int, batch: int, seed: int, text: Text) -> dict[str, Any]:
    """Trains until step max(AT), half of its schedule, and measures on the way."""
    tokens = 2 * max(AT) * batch / body_parameters(rung)
    run = Run(rung, tokens, batch, "adamw", k, seed)
    training = Training(run, text, Place("cpu"))
    block_map = map_blocks(training.model)
    unseen = [text.batch(seed + 1_000_000, number, SEQUENCES) for number in range(BATCHES)]
    points = []
    for step in AT:
        if step > training.done:
            training.until(step)
        sharp = measure_sharpness(training.model, unseen, block_map=block_map, draws=DRAWS, predictions=predictions)
        before = snapshot(training.model)
        loss = training.until(step + 1)
        updates = measure_updates(training.model, before, unseen, block_map=block_map, predictions=predictions)
        points.append(
            {"step": step, "training": round(loss, 4), "sharpness": sharp.as_dict(), "updates": updates.as_dict()}
        )
        print(rung, step, round(loss, 4), " < ".join("~".join(level) for level in sharp.as_dict()["order"]), flush=True)
    return {
        "rung": rung,
        "lr": learning_rate(k),
        "batch": batch,
        "seed": seed,
        "points": points,
        "text": text.digest,
        "machine": machine(training.place),
        "versions": versions(),
        "commit": commit(),
    }


def load(folder: Path) -> list[dict[str, Any]]:
    """All runs of a folder, smallest model first."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def order_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: which block types are sharper than which, at every step of every run, and the factors along the updates."""
    lines = [
        "| model | step | from flat to sharp | the norms' factor along their update over the FFN's |",
        "| --- | --: | --- | --: |",
    ]
    for run in runs:
        for point in run["points"]:
            order = " < ".join(" ~ ".join(level) for level in point["sharpness"]["order"])
            blocks = point["updates"]["blocks"]
            norm, ffn = (blocks[of]["multiplier"] for of in ("norm", "ffn"))
            known = all(blocks[of]["multiplier"] > 2 * blocks[of]["error"] for of in ("norm", "ffn"))
            lines.append(
                f"| {run['rung']} | {point['step']:,} | {order} | {f'{norm / ffn:.0f}' if known else 'not known'} |"
            )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Sharpness over steps with two standard errors, the paper's beside it; below, the factors along the updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(runs) + 1, figsize=(3.6 * (len(runs) + 1), 6.2), squeeze=False)
    for column, run in enumerate(runs):
        steps = [max(point["step"], 30) for point in run["points"]]
        for block, color in COLORS.items():
            of = [point["sharpness"]["blocks"][block] for point in run["points"]]
            values, errors = [one["sharpness"] for one in of], [2 * one["error"] for one in of]
            axes[0, column].errorbar(steps, values, errors, color=color, marker="o", ms=3, label=block, capsize=2)
            of = [point["updates"]["blocks"][block] for point in run["points"]]
            values = [one["multiplier"] if one["multiplier"] > 0 else math.nan for one in of]
            axes[1, column].errorbar(
                steps, values, [2 * one["error"] for one in of], color=color, marker="o", ms=3, label=block, capsize=2
            )
        axes[0, column].set_title(
            f"{run['rung']}, {run['batch'] // 1024}k tokens a batch, lr {run['lr']:g}", fontsize=9
        )
        axes[1, column].set_xlabel("step (0 drawn at 30)")
    paper = axes[0, len(runs)]
    for number, block in enumerate(("embedding", "qk", "ffn", "vo", "norm")):
        paper.plot(
            [max(step, 30) for step in PAPER],
            [values[number] for values in PAPER.values()],
            color=COLORS[block],
            marker="s",
            ms=3,
        )
    paper.set_title("arXiv 2502.19002, LLaMA 0.25B", fontsize=9)
    paper.set_xlabel("step (0 drawn at 30)")
    axes[1, len(runs)].axis("off")
    axes[1, len(runs)].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", fontsize=9, frameon=False)
    axes[0, 0].set_ylabel("sharpness (trace / parameters)")
    axes[1, 0].set_ylabel("factor along the update")
    for axis in (*axes[0], *axes[1, :-1]):
        axis.set_xscale("log")
        axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "draw"))
    parser.add_argument("--rung", default="0.3M", help="the model")
    parser.add_argument("--k", type=int, default=4, help="half octaves of learning rate from 1e-3")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=Path("runs/reproduce"), help="folder for the encoded text")
    parser.add_argument("--rows", type=Path, default=HERE / "order", help="folder of the runs")
    args = parser.parse_args()
    if args.command == "draw":
        draw(load(args.rows), HERE / "order.png")
        return
    torch.set_num_threads(1)
    found = measure(args.rung, args.k, args.batch, args.seed, Text(args.text, args.rung))
    args.rows.mkdir(parents=True, exist_ok=True)
    (args.rows / f"{args.rung}-{args.batch // 1024}k-seed{args.seed}.json").write_text(
        json.dumps(found, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
