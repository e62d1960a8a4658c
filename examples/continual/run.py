"""From a saved checkpoint to new data through the DeepSpeed door: re-warm or not, how long, and replay (arXiv 2308.04014).

python examples/continual/run.py             # trains what the folder of rows lacks, and prints the table
python examples/continual/run.py --report    # only README.md's table and picture, from rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import deepspeed
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from text import Texts

import blockwise_lr.deepspeed  # noqa: F401  registers BlockwiseAdamW and the schedulers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproduce"))
from model import build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import alone
from rows import commit, machine, save_figure, table, versions, write_page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EVERY = 10  # steps between two points of a curve
OLD_WARMUP = 0.1  # share of the old run's steps
# arm -> the warmup's share of the new steps, and the share of old text; None: the old schedule goes on at its floor
ARMS: dict[str, tuple[float | None, float]] = {
    "not re-warmed": (None, 0.0),
    "re-warmed, 0%": (0.0, 0.0),
    "re-warmed, 1%": (0.01, 0.0),
    "re-warmed, 2%": (0.02, 0.0),
    "re-warmed, 1%, 5% replay": (0.01, 0.05),
    "re-warmed, 1%, 25% replay": (0.01, 0.25),
}
ANEW = "trained anew"


def ds_config(arm: str, steps: int, old_steps: int) -> dict[str, Any]:
    """The config of an arm: ds_config.json with its schedule."""
    config = json.loads((HERE / "ds_config.json").read_text())
    share, _ = ARMS.get(arm, (None, 0.0))
    if share is not None:
        config["scheduler"]["params"] = {
            "begin_num_steps": old_steps,
            "total_num_steps": steps,
            "warmup_num_steps": round(share * steps),
        }
        return config
    total = steps if arm == ANEW else old_steps
    params = {"total_num_steps": total, "warmup_num_steps": max(round(OLD_WARMUP * total), 1)}
    config["scheduler"] = {"type": "BlockwiseWarmupCosine", "params": params}
    return config


class Run:
    """An engine, and the losses on both texts."""

    def __init__(self, config: dict[str, Any], rung: str, seed: int, texts: Texts) -> None:
        self.texts, self.seed = texts, seed
        self.engine, *_ = deepspeed.initialize(model=build_model(rung, seed), config=config)
        self.curve: dict[str, list[float]] = {"step": [], "old": [], "new": [], "lr": []}

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.engine(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def note(self, step: int) -> None:
        """A point of the curve: held-out losses, and the base rate."""
        self.engine.eval()
        self.curve["step"].append(step)
        for which, ids in self.texts.held_out.items():
            self.curve[which].append(round(float(self.loss(ids)), 4))
        self.curve["lr"].append(self.engine.get_lr()[0])
        self.engine.train()

    def train(self, which: str, steps: int, replay: float = 0.0) -> None:
        """Steps on a text, from batch 0 of it."""
        self.note(0)
        for step in range(steps):
            batch = self.texts.batch(which, 2 * self.seed + (which == "new"), step, replay)
            self.engine.backward(self.loss(batch))
            self.engine.step()
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                self.note(step + 1)


def old_run(given: argparse.Namespace, seed: int, texts: Texts) -> Path:
    """The folder of a run on the old text, trained and saved where it is not there yet."""
    folder = given.out / f"old-{given.rung}-{given.old_steps}-seed{seed}"
    if not (folder / "latest").exists():
        run = Run(ds_config("old", given.steps, given.old_steps), given.rung, seed, texts)
        run.train("old", given.old_steps)
        run.engine.save_checkpoint(str(folder))
        run.engine.destroy()
    return folder


def train(given: argparse.Namespace, arm: str, seed: int, texts: Texts) -> dict[str, Any]:
    """One arm: a row."""
    config = ds_config(arm, given.steps, given.old_steps)
    run = Run(config, given.rung, seed, texts)
    if arm != ANEW:
        run.engine.load_checkpoint(str(old_run(given, seed, texts)))
    run.train("new", given.steps, ARMS.get(arm, (None, 0.0))[1])
    run.engine.destroy()
    return {
        "arm": arm,
        "seed": seed,
        "rung": given.rung,
        "old_steps": given.old_steps,
        "steps": given.steps,
        "curve": run.curve,
        "machine": machine(),
        "versions": versions("torch", "deepspeed", "transformers", "blockwise-lr"),
        "commit": commit(HERE),
    }


def of_arm(rows: list[dict], arm: str) -> list[dict]:
    """An arm's seeds."""
    return sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])


def losses(rows: list[dict]) -> str:
    """Means over the seeds, and their range."""
    lines = [["arm", "seeds", "new text", "max - min", "old text", "max - min", "highest on the old text"]]
    for arm in [*ARMS, ANEW]:
        found = of_arm(rows, arm)
        if not found:
            continue
        cells = [arm, str(len(found))]
        for which in ("new", "old"):
            finals = [row["curve"][which][-1] for row in found]
            cells += [f"{np.mean(finals):.3f}", f"{np.ptp(finals):.3f}"]
        highest = np.mean([max(row["curve"]["old"]) for row in found])
        lines.append([*cells, "" if arm == ANEW else f"{highest:.3f}"])
    return table(lines)


def draw(rows: list[dict], file: Path) -> None:
    """The loss on each text over the new steps, and its first steps closer; means over the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8))
    styles = {
        "not re-warmed": ("#777777", "-"),
        "re-warmed, 0%": ("#b5482f", "-"),
        "re-warmed, 1%": ("#1f5fbf", "-"),
        "re-warmed, 2%": ("#63a0e8", "--"),
        "re-warmed, 1%, 5% replay": ("#3c8c40", "-."),
        "re-warmed, 1%, 25% replay": ("#1c5220", ":"),
        ANEW: ("#000000", (0, (1, 2))),
    }
    for arm, (color, style) in styles.items():
        found = of_arm(rows, arm)
        if not found:
            continue
        steps = found[0]["curve"]["step"]
        new, old = (np.mean([row["curve"][which] for row in found], axis=0) for which in ("new", "old"))
        for axis, losses in zip(axes, (new, new, old)):
            if arm != ANEW or axis is axes[0]:
                axis.plot(steps, losses, color=color, ls=style, lw=1.4, label=arm)
    last = max((row["steps"] for row in rows), default=1)
    axes[0].set(title="new text", ylabel="held-out loss (nats a token)", ylim=(None, _highest(rows, "new") + 0.3))
    axes[1].set(title="new text, the first fifth", xlim=(0, last / 5))
    axes[2].set(title="old text")
    for axis in axes:
        axis.set_xlabel("steps on the new text")
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8)
    save_figure(figure, file)
    plt.close(figure)


def _highest(rows: list[dict], which: str) -> float:
    return max((max(row["curve"][which]) for row in rows if row["arm"] != ANEW), default=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rung", default="0.3M", help="a model of examples/reproduce")
    parser.add_argument("--old-steps", type=int, default=400, help="steps on the old text")
    parser.add_argument("--steps", type=int, default=300, help="steps on the new text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, ANEW], default=[*ARMS, ANEW])
    parser.add_argument("--text", type=Path, default=ROOT / "runs" / "reproduce", help="folder for the token ids")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "continual", help="checkpoints, rows and picture")
    parser.add_argument("--report", action="store_true", help="only README.md and its picture, from rows.jsonl here")
    given = parser.parse_args()
    if given.report:
        rows, page = _rows(HERE / "rows.jsonl"), HERE / "README.md"
        write_page(page, {"losses": losses(rows)})
        draw(rows, HERE / "curves.png")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "rows.jsonl"
    rows = _rows(file)
    torch.set_num_threads(1)
    alone.start()
    texts = Texts(given.text)
    for seed in range(given.seeds):
        for arm in given.arms:
            wanted = {"arm": arm, "seed": seed, "rung": given.rung, "old_steps": given.old_steps, "steps": given.steps}
            if any(wanted.items() <= row.items() for row in rows):
                continue
            rows.append(train(given, arm, seed, texts))
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            curve = rows[-1]["curve"]
            print(f"{arm}, seed {seed}: new {curve['new'][-1]}, old {curve['old'][-1]}", file=sys.stderr, flush=True)
    draw(rows, given.out / "curves.png")
    print(losses(rows), f"picture: {given.out / 'curves.png'}", sep="\n\n")


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
