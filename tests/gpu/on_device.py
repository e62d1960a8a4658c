"""Trains the small models on a CUDA device, one NCCL rank; a line of JSON per case says how far it is from its twin.

Started by test_device.py in a process of its own, as the rest of the suite runs on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cuda")  # "cpu" rehearses it
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29577")
os.environ.setdefault("BLOCKWISE_LR_TEST_REFERENCES", tempfile.mkdtemp())

import deepspeed
import torch
from deepspeed_door import engines
from deepspeed_door.own_gradients import followed
from gpu.cases import CASES
from torch.distributed.fsdp import fully_shard
from twins import make, token_ids, worst_difference

from blockwise_lr import map_blocks, optim
from blockwise_lr.schedules import BlockwiseWarmupCosine

STEPS = 10
DEVICE = torch.device(os.environ["DS_ACCELERATOR"])


def plain(kind: str, model_kind: str, sharded: bool) -> dict[str, float]:
    """The PyTorch door: ten steps of the model on the device, FSDP2's parameters where asked for."""
    model = make(model_kind).to(DEVICE)
    if sharded:
        fully_shard(model)
    block_map = map_blocks(model)
    options = engines.options_of(
        kind, {"lr": engines.LR, "betas": engines.BETAS, "eps": engines.EPS, "weight_decay": engines.DECAY}
    )
    optimizer = optim.CLASSES[kind](model.named_parameters(), block_map=block_map, **options)
    schedule = BlockwiseWarmupCosine(optimizer, STEPS, engines.WARMUP, min_lr=engines.MIN_LR)
    for batch in token_ids(STEPS, engines.ACCUMULATION, 1):
        for part in batch:
            ids = part[0].to(DEVICE)
            (model(ids, labels=ids).loss / engines.ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), engines.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    found = {name: _whole(p).cpu() for name, p in model.named_parameters()}
    return {"worst": worst_difference(found, engines.reference(model_kind, kind, STEPS, 1), kind)}


def _whole(p: torch.Tensor) -> torch.Tensor:
    value = p.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def zero(kind: str, model_kind: str, stage: int, options: dict[str, Any]) -> dict[str, float]:
    """The DeepSpeed door in fp32, against the twin."""
    found = engines.trained(model_kind, engines.config(kind, stage, steps=STEPS, **options), STEPS)
    return {"worst": worst_difference(found, engines.reference(model_kind, kind, STEPS, 1), kind)}


def same_gradients(kind: str, model_kind: str, stage: int, options: dict[str, Any]) -> dict[str, float]:
    """The DeepSpeed door in low precision: the plain optimizer steps beside it from the same gradients."""
    worst, steps = followed(kind, model_kind, stage, options)
    assert steps == STEPS
    return {"worst": worst}


def resumed(kind: str, model_kind: str, stage: int, options: dict[str, Any]) -> dict[str, float]:
    """Saved after five steps and loaded into a new engine: elements that differ from ten steps in one go."""
    settings = engines.config(kind, stage, steps=STEPS, **options)
    straight = engines.trained(model_kind, settings, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        first = engines.start(make(model_kind), settings)
        engines.train(first, 5)
        first.save_checkpoint(folder)
        first.destroy()
        second = engines.start(make(model_kind, seed=1), settings)
        second.load_checkpoint(folder)
        engines.train(second, 5, first=5)
        found = engines.weights(second)
        second.destroy()
    return {"different": sum(int((found[name] != straight[name]).sum()) for name in straight)}


CHECKS: dict[str, Callable[..., dict[str, float]]] = {
    "plain": plain,
    "zero": zero,
    "same_gradients": same_gradients,
    "resumed": resumed,
}


def main() -> None:
    torch.set_float32_matmul_precision("highest")
    deepspeed.init_distributed("gloo" if DEVICE.type == "cpu" else None)
    for name, (check, *arguments) in CASES.items():
        try:
            said: dict[str, Any] = CHECKS[check](*arguments)
        except Exception:
            said = {"error": traceback.format_exc()}
        print("RESULT", json.dumps({"case": name, **said}), flush=True)


if __name__ == "__main__":
    main()
