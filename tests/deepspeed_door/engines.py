"""Trains the small models through real DeepSpeed engines; runs in the rank processes."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from kinds import options_of
from references import once
from twins import RATIOS, REFERENCES, Twin, make, paper_lr, token_ids

LR, MIN_LR, WARMUP, DECAY, BETAS, CLIP, ACCUMULATION = 2e-3, 1e-4, 3, 0.1, (0.9, 0.95), 0.5, 2
# Key biases have no gradient but rounding noise (softmax ignores what is the same for all keys), which Adam with a tiny
# eps blows up to full steps; this eps keeps noise of 1e-9 below what the comparison sees.
EPS = 1e-5


def config(
    kind: str,
    stage: int,
    *,
    dtype: str = "fp32",
    optimizer: dict | None = None,
    zero: dict | None = None,
    steps: int = 10,
    scheduler: dict | None = None,
    **top: Any,
) -> dict:
    """A ds_config with gradient clipping and accumulation."""
    entry = {
        "type": kind,
        "params": {
            **options_of(kind, {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY}),
            **(optimizer or {}),
        },
    }
    schedule = {
        "type": "BlockwiseWarmupCosine",
        "params": {"total_num_steps": steps, "warmup_num_steps": WARMUP, "min_lr": MIN_LR},
    }
    made = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "optimizer": entry,
        "scheduler": scheduler or schedule,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **top,
    }
    if dtype != "fp32":
        made[dtype] = {"enabled": True, **({"initial_scale_power": 8} if dtype == "fp16" else {}), **top.get(dtype, {})}
    return made


def start(model: torch.nn.Module, settings: dict, **arguments: Any) -> Any:
    """deepspeed.initialize, quietly."""
    import deepspeed

    import blockwise_lr.deepspeed  # noqa: F401  the one line a user adds

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo" if deepspeed.get_accelerator().device_name() == "cpu" else None)
    if deepspeed.__version__ in ("0.18.7", "0.18.8", "0.18.9"):
        # they flatten with autograd on where memory allows, and gloo gathers into no such tensor
        deepspeed.get_accelerator().available_memory = lambda *_: 0
    if "mpu" not in arguments:  # DeepSpeed keeps that of the last engine of the process, and takes it for this one's
        deepspeed.utils.groups.mpu = None
    return deepspeed.initialize(model=model, config=settings, **arguments)[0]


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    """Trains from update ``first`` on and returns the losses of this rank's micro batches."""
    data = token_ids(first + steps, ACCUMULATION, dist.get_world_size())[first:]
    losses = []
    for batch in data:
        for part in batch:
            ids = part[dist.get_rank()].to(engine.device)
            loss = engine(ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 weights of every parameter, whole, on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    copies = {}
    for fp32s, lows in zip(getattr(engine.optimizer, "fp32_groups", ()), getattr(engine.optimizer, "fp16_groups", ())):
        copies.update({id(low): fp32 for low, fp32 in zip(lows, fp32s)})
    found = {}
    for name, p in engine.module.named_parameters():
        if engine.zero_optimization() or hasattr(
            p, "_hp_mapping"
        ):  # BF16_Optimizer, as DeepSpeed 0.17 has in stage 0 too
            value = safe_get_full_fp32_param(p)
        else:
            value = copies.get(id(p), p)
        found[name] = value.detach().float().clone().cpu()
    return found


@once
def reference(
    model_kind: str,
    kind: str,
    steps: int,
    ranks: int,
    *,
    dtype: torch.dtype = torch.float32,
    ratios: dict[str, float] = RATIOS,
    decay: float = DECAY,
) -> dict[str, torch.Tensor]:
    """The weights of the unfused twin after the same steps in one process."""
    twin = Twin(model_kind, make(model_kind))
    optimizer = REFERENCES[kind](twin, BETAS, EPS, decay, ratios)
    for number, batch in enumerate(token_ids(steps, ACCUMULATION, ranks), 1):
        for part in batch:
            for ids in part:
                twin.backward(ids, 1 / (ACCUMULATION * ranks), dtype)
        twin.clip(CLIP)
        optimizer.step(lambda ratio: paper_lr(number, ratio, LR, MIN_LR, WARMUP, steps))
    return {name: value.detach() for name, value in twin.values().items()}


def trained(model_kind: str, settings: dict, steps: int, **arguments: Any) -> dict[str, torch.Tensor]:
    """Weights after training the model through an engine."""
    engine = start(make(model_kind), settings, **arguments)
    train(engine, steps)
    found = weights(engine)
    engine.destroy()
    return found
