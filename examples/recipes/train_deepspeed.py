"""Pre-trains one arm of the recipes with DeepSpeed; started by torchrun on every rank.

torchrun --standalone --nproc_per_node 4 examples/recipes/train_deepspeed.py --arm adamw --model gpt2-124m \
    --data data/openwebtext --out data/runs/adamw --lr 6e-4

A plain training loop: a transformers model, deepspeed.initialize from the arm's ds_config, backward, step. The one line
that makes the config's types known is ``import blockwise_lr.deepspeed``. Started again with the same ``--out`` it goes
on from the newest checkpoint there.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sequences import Sequences, read_meta
from transformers import AutoConfig, AutoModelForCausalLM

import blockwise_lr.deepspeed

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "configs" / "models"
VOCABULARY_MULTIPLE = 128  # as Megatron pads by default: GPT-2's 50257 tokens become the paper's 50304


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; DeepSpeed's own launcher adds ``--local_rank``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", required=True, help="name in ds_configs/, or a ds_config of your own")
    parser.add_argument("--model", required=True, help="name in configs/models/, or a config of your own")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the curve and the checkpoints")
    parser.add_argument("--lr", type=float, help="base learning rate, in place of the ds_config's; min_lr is lr / 20")
    parser.add_argument("--seed", type=int, default=41, help="of the weights and of the order of the data")
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward pass, in place of the ds_config's")
    parser.add_argument("--batch", type=int, help="sequences of a step over all ranks, in place of the ds_config's")
    parser.add_argument("--steps", type=int, help="in place of the ds_config's; the warmup keeps its share")
    parser.add_argument("--log-interval", type=int, default=10, help="steps from one line of the curve to the next")
    parser.add_argument("--eval-interval", type=int, default=1000)
    parser.add_argument("--eval-sequences", type=int, default=3000)
    parser.add_argument("--save-interval", type=int, default=5000)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def named(name: str, folder: Path) -> dict[str, Any]:
    """The JSON of that name in a folder, or of that file.

    Raises:
        SystemExit: there is neither.
    """
    file = folder / f"{name}.json"
    file = file if file.is_file() else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise SystemExit(f"train_deepspeed.py: there is no {name!r}; name a file or one of {known}")
    return json.loads(file.read_text())


def ds_config(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The arm's ds_config with what the command line changes.

    Raises:
        SystemExit: micro batch x ranks does not divide the batch.
    """
    config = named(args.arm, HERE / "ds_configs")
    schedule = config["scheduler"]["params"]
    if args.lr is not None:
        config["optimizer"]["params"]["lr"] = args.lr
    if args.steps is not None:
        warmup = round(schedule["warmup_num_steps"] * args.steps / schedule["total_num_steps"])
        schedule.update(total_num_steps=args.steps, warmup_num_steps=warmup)
    config["train_batch_size"] = batch = args.batch or config["train_batch_size"]
    config["train_micro_batch_size_per_gpu"] = micro = args.micro_batch or config["train_micro_batch_size_per_gpu"]
    if batch % (micro * ranks):
        raise SystemExit(
            f"train_deepspeed.py: {ranks} ranks with micro batches of {micro} sequences cannot share {batch} sequences a "
            "step evenly; choose --micro-batch so that micro batch x ranks divides the batch, or another --batch for all "
            "arms"
        )
    return config


def build_model(settings: dict[str, Any], vocabulary: int, seed: int) -> torch.nn.Module:
    """A fresh model as the paper trains it: the data's vocabulary, padded; no dropout; no biases."""
    config = AutoConfig.for_model(**settings)
    config.vocab_size = math.ceil(vocabulary / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config.use_cache = False
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # transformers' GPT-2 cannot be had without; they are 0 at the start, and stay so
            p.requires_grad_(False)
    return model


def loss_of(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss, in nats per token, of (sequences, length + 1) token ids."""
    ids = ids.to(engine.device)
    logits = engine(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def mean_over_ranks(value: torch.Tensor) -> float:
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def train_step(engine: Any, data: Sequences, seed: int) -> torch.Tensor:
    """One step on the batch of its number; returns this rank's mean loss."""
    ranks, rank, micro = dist.get_world_size(), dist.get_rank(), engine.train_micro_batch_size_per_gpu()
    losses = []
    for part in range(engine.gradient_accumulation_steps()):
        first = engine.global_steps * engine.train_batch_size() + (part * ranks + rank) * micro
        loss = loss_of(engine, data.batch(first, micro, seed))
        engine.backward(loss)
        losses.append(loss.detach())
        engine.step()
    return torch.stack(losses).mean()


@torch.no_grad()
def validate(engine: Any, data: Sequences, sequences: int) -> float:
    """Mean loss on the file's first sequences, the same ones at every call and for every arm."""
    micro, ranks = engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
    rounds = min(sequences, data.count) // (micro * ranks)
    if not rounds:
        raise SystemExit(
            f"train_deepspeed.py: {ranks} ranks with micro batches of {micro} cannot evaluate "
            f"{min(sequences, data.count)} sequences; lower --micro-batch, or raise --eval-sequences or the data"
        )
    engine.eval()
    firsts = [(number * ranks + dist.get_rank()) * micro for number in range(rounds)]
    loss = torch.stack([loss_of(engine, data.batch(first, micro)) for first in firsts]).mean()
    engine.train()
    return mean_over_ranks(loss)


class Curve:
    """``curve.jsonl``: one line per logged step, written by the first rank, with what came after a resumed step cut off."""

    def __init__(self, out: Path, step: int) -> None:
        self._file = out / "curve.jsonl"
        if dist.get_rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
            self._file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def add(self, **entry: Any) -> None:
        if dist.get_rank() == 0:
            with self._file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            shown = (
                f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items()
            )
            print("  ".join(shown), flush=True)


def train(engine: Any, args: argparse.Namespace, steps: int, length: int) -> None:
    """From the engine's step up to the last one, with log lines, evaluations and checkpoints.

    Raises:
        SystemExit: the loss is no longer finite.
    """
    text = {side: Sequences(args.data / f"{side}.bin", length) for side in ("training", "validation")}
    curve = Curve(args.out, engine.global_steps)
    losses, began = [], time.perf_counter()
    while engine.global_steps < steps:
        losses.append(train_step(engine, text["training"], args.seed))
        step = engine.global_steps
        last, evaluate = step == steps, step % args.eval_interval == 0 or step == steps
        if step % args.log_interval == 0 or evaluate:
            loss = mean_over_ranks(torch.stack(losses).mean())
            entry = {"step": step, "tokens": step * engine.train_batch_size() * length, "loss": loss}
            if not math.isfinite(loss):
                raise SystemExit(f"train_deepspeed.py: the loss is {loss} at step {step}; lower --lr")
            if evaluate:
                entry["validation_loss"] = validate(engine, text["validation"], args.eval_sequences)
            curve.add(**entry, lr=engine.get_lr()[0], seconds=round(time.perf_counter() - began, 1))
            losses = []
        if step % args.save_interval == 0 or last:
            engine.save_checkpoint(str(args.out / "checkpoints"))


def main(words: Sequence[str] | None = None) -> Any:
    """Trains to the end and returns the engine."""
    args = arguments(words)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed()
    config = ds_config(args, dist.get_world_size())
    steps = config["scheduler"]["params"]["total_num_steps"]
    model = build_model(named(args.model, MODELS), read_meta(args.data)["vocabulary"], args.seed)
    length = model.config.max_position_embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    blockwise_lr.deepspeed.load_newest(engine, str(args.out / "checkpoints"))
    train(engine, args, steps, length)
    return engine


if __name__ == "__main__":
    engine = main()
    engine.destroy()
    del engine
    gc.collect()  # so that its process groups' threads end before Python does: one that outlives it can abort the process
    dist.barrier()
    dist.destroy_process_group()
