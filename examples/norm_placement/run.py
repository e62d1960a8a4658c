"""Post-LN with and without a warmup, pre-LN without, at two depths: what arXiv 2002.04745 found, tried on one CPU core.

``python examples/norm_placement/run.py`` trains what rows.jsonl lacks, one line per run, and prints the table of README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sysconfig
from pathlib import Path

import torch
from model import Transformer
from torch.nn import functional as F

from blockwise_lr import BlockwiseAdamW

HERE = Path(__file__).parent
ARMS = {"post-LN, warmup": ("post", True), "post-LN": ("post", False), "pre-LN": ("pre", False)}
ONE_RATE = dict.fromkeys(("embedding", "head", "qk", "vo", "ffn"), 1.0)
BATCH, LENGTH, WARMUP_SHARE, LAST = (
    16,
    64,
    4,
    50,
)  # the warmup is a quarter of the steps; losses are means of the last 50


def text() -> torch.Tensor:
    """The modules of Python's standard library, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def train(data: torch.Tensor, arm: str, depth: int, lr: float, steps: int, seed: int) -> dict:
    """One run, at one rate for all blocks, constant behind the warmup: a row."""
    placement, warms_up = ARMS[arm]
    torch.manual_seed(seed)
    model = Transformer(depth, placement)
    optimizer = BlockwiseAdamW(
        model.named_parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, block_lr_ratios=ONE_RATE
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=generator)
        ids = torch.stack([data[start : start + LENGTH + 1] for start in starts]).long()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step * WARMUP_SHARE / steps) if warms_up else lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    last = losses[-LAST:]
    return {
        "arm": arm,
        "depth": depth,
        "lr": lr,
        "steps": steps,
        "seed": seed,
        "loss": round(sum(last) / len(last), 4),
        "every_50": [round(loss, 3) for loss in losses[::50]],
    }


def table(rows: list[dict]) -> str:
    """Loss of each arm, depth and rate, every seed."""
    settings = sorted({(row["depth"], row["lr"]) for row in rows})
    lines = ["| depth, lr | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    for depth, lr in settings:
        of = [
            ", ".join(f"{r['loss']:.2f}" for r in rows if (r["arm"], r["depth"], r["lr"]) == (arm, depth, lr))
            for arm in ARMS
        ]
        lines.append(f"| {depth} layers, {lr:g} | " + " | ".join(of) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6, 12])
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=HERE / "rows.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    data = text()
    for seed, depth, lr, arm in itertools.product(range(given.seeds), given.depths, given.lrs, ARMS):
        wanted = {"arm": arm, "depth": depth, "lr": lr, "steps": given.steps, "seed": seed}
        if any(wanted.items() <= row.items() for row in rows):
            continue
        rows.append(train(data, arm, depth, lr, given.steps, seed))
        with given.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1]["loss"], wanted, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
