"""Pre-trains the demo's GPT with DeepSpeed, arm after arm; run by torchrun on every rank.

What a user of DeepSpeed does is in ``train``: a ds_config, deepspeed.initialize, backward, step. The one line that
makes the config's ``BlockwiseAdamW`` known is ``import blockwise_lr.deepspeed``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from corpus import tokens
from model import GPT, GPTConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import blockwise_lr.deepspeed  # noqa: F401  registers BlockwiseAdamW, BlockwiseAdamMini and BlockwiseWarmupCosine

HERE = Path(__file__).parent
LENGTH = 128
BATCH = 16  # sequences per step, over all ranks
EVALUATIONS = 10
SEEDS = 2
# both arms try the same learning rates, a factor of 2 apart
SWEEP = dict.fromkeys(("AdamW", "BlockwiseAdamW"), (1e-3, 2e-3, 4e-3))


@dataclass
class Run:
    """One training run: validation losses at steps, seconds of training, optimizer state bytes on this rank."""

    optimizer: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    state_bytes: int = 0


def batches(data: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """(steps, BATCH, LENGTH + 1) token ids, drawn at random places; the same for every arm."""
    starts = np.random.default_rng(seed).integers(0, len(data) - LENGTH - 1, (steps, BATCH))
    return np.stack([[data[s : s + LENGTH + 1] for s in row] for row in starts]).astype(np.int64)


def ds_config(optimizer: str, lr: float, steps: int, tensorboard: bool) -> dict:
    """The demo's ds_config with this arm's optimizer, learning rate and length."""
    config = json.loads((HERE / "ds_config.json").read_text())
    config["train_micro_batch_size_per_gpu"] = BATCH // dist.get_world_size()
    config["optimizer"]["type"] = optimizer
    config["optimizer"]["params"]["lr"] = lr
    if optimizer == "AdamW":
        config["optimizer"]["params"].pop("block_lr_ratios")
        config["optimizer"]["params"]["torch_adam"] = True
    config["scheduler"]["params"].update(total_num_steps=steps, warmup_num_steps=max(steps // 10, 1))
    config["tensorboard"]["enabled"] = tensorboard
    config["tensorboard"]["job_name"] = optimizer
    return config


@torch.no_grad()
def validate(engine: deepspeed.DeepSpeedEngine, held_out: torch.Tensor) -> float:
    """Mean loss on the held-out sequences, shared out over the ranks."""
    engine.eval()
    part = held_out.chunk(dist.get_world_size())[dist.get_rank()]
    loss = torch.stack([engine(ids) for ids in part.split(16)]).mean()
    dist.all_reduce(loss)
    engine.train()
    return float(loss) / dist.get_world_size()


def train(
    optimizer: str,
    lr: float,
    seed: int,
    data: np.ndarray,
    held_out: torch.Tensor,
    *,
    tick: Callable[[str, float | None], None],
    tensorboard: bool = False,
) -> Run:
    """Trains a fresh model on ``data`` (steps, BATCH, LENGTH + 1) and returns its curve."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig())
    # as BlockwiseAdamW does by default, AdamW leaves the norms undecayed
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    config = ds_config(optimizer, lr, len(data), tensorboard)
    engine, *_ = deepspeed.initialize(
        model=model, config=copy.deepcopy(config), model_parameters=groups if optimizer == "AdamW" else None
    )
    run = Run(optimizer, lr, seed)
    every = max(len(data) // EVALUATIONS, 1)
    for step, batch in enumerate(data, 1):
        began = time.perf_counter()
        ids = torch.from_numpy(batch).chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        run.seconds += time.perf_counter() - began
        if step % every == 0 or step == len(data):
            run.steps.append(step)
            run.losses.append(validate(engine, held_out))
        tick(f"{optimizer} lr {lr:g} seed {seed}", run.losses[-1] if run.losses else None)
    run.state_bytes = sum(
        value.numel() * value.element_size()
        for state in engine.optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    engine.destroy()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    args = parser.parse_args()

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # it announces the extension it builds
        deepspeed.init_distributed("gloo")
    if dist.get_rank() == 0:
        tokens(args.out, validation=True)  # trains the tokenizer and encodes the text, once
        tokens(args.out, validation=False)
    dist.barrier()
    held_out = torch.from_numpy(batches(tokens(args.out, validation=True), 4, seed=2).reshape(-1, LENGTH + 1))
    text = tokens(args.out, validation=False)
    data = [batches(text, args.steps, seed=1 + 2 * seed) for seed in range(SEEDS)]  # 2 drew the held-out sequences

    tries = sum(map(len, SWEEP.values()))
    total = args.steps * (tries + (SEEDS - 1) * len(SWEEP) + SEEDS)
    with Progress(
        TextColumn("{task.description:<42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=dist.get_rank() != 0,
    ) as progress:
        task = progress.add_task("", total=total)

        def tick(what: str, loss: float | None) -> None:
            shown = "" if loss is None else f"  loss {loss:.3f}"
            progress.update(task, advance=1, description=what + shown)

        def arm(optimizer: str, lr: float, seed: int, tensorboard: bool = False) -> Run:
            return train(optimizer, lr, seed, data[seed], held_out, tick=tick, tensorboard=tensorboard)

        sweep = [arm(optimizer, lr, 0) for optimizer, lrs in SWEEP.items() for lr in lrs]
        runs = []
        for optimizer in SWEEP:
            best = min((run for run in sweep if run.optimizer == optimizer), key=lambda run: run.losses[-1])
            runs += [best, *(arm(optimizer, best.lr, seed, tensorboard=seed == 1) for seed in range(1, SEEDS))]
        runs += [arm("BlockwiseAdamMini", runs[-1].lr, seed, tensorboard=seed == 1) for seed in range(SEEDS)]
    if dist.get_rank() == 0:
        results = {"sweep": [asdict(run) for run in sweep], "runs": [asdict(run) for run in runs]}
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
    gc.collect()  # engines that are done: their process groups' threads end before Python does
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
