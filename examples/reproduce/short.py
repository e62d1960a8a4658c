"""One short run of the ladder for `blockwise-lr tune`: prints its loss on held-out tokens, as a user's script would.

    blockwise-lr tune --out runs/tune --lr 4e-3 --start paper -- \
        python examples/reproduce/short.py --lr {lr} --ratios {ratios} --seed {seed}
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from arms import CLIP, Arm, build_optimizer
from data import Text
from model import RUNGS, build_model
from training import FINAL, Place

from blockwise_lr.schedules import BlockwiseWarmupCosine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, required=True, help="base learning rate")
    parser.add_argument("--ratios", type=json.loads, default="{}", help="JSON by block type")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rung", choices=RUNGS, default="0.3M")
    parser.add_argument("--steps", type=int, default=95)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--text", type=Path, default=Path("runs/reproduce"), help="folder for the encoded text")
    args = parser.parse_args()
    place, text = Place("cpu"), Text(args.text, args.rung)
    model = build_model(args.rung, args.seed)
    arm = Arm("BlockwiseAdamW", 0, {"block_lr_ratios": args.ratios})
    optimizer = build_optimizer(arm, model, args.lr)
    schedule = BlockwiseWarmupCosine(optimizer, args.steps, max(round(arm.warmup * args.steps), 1))
    for step in range(args.steps):
        for part in (parts := place.parts(text.batch(args.seed, step, args.batch // text.length))):
            (place.loss(model, part) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    loss = place.evaluate(model, text.held_out(FINAL // text.length))
    print(f"step {args.steps} validation loss {loss:.5f}")


if __name__ == "__main__":
    main()
