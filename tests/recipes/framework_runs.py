"""Runs of examples/frameworks on the CPU; they run in the rank processes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kinds import KINDS, options_of
from twins import VOCABULARY, make

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "frameworks"
STEPS, SAVE_AT, LR = 6, 3, 2e-3


def example(name: str) -> Any:
    """A module of examples/frameworks."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def optimizer_of(kind: str) -> Any:
    """A class of optimizers, with an eps at which biases that start at 0 can be compared."""
    return functools.partial(KINDS[kind].optimizer, **options_of(kind, {"eps": 1e-5}))


def batches(rank: int) -> torch.Tensor:
    """A rank's token ids: (STEPS, sequences, tokens)."""
    return torch.randint(VOCABULARY, (STEPS, 2, 12), generator=torch.Generator().manual_seed(7 + rank))


@contextlib.contextmanager
def accelerator(**settings: Any) -> Iterator[Any]:
    """An Accelerator on the CPU, whose state is this case's alone. Accelerate shards where there are several GPUs only, so
    the processes are said to have some; everything else of it is as it is."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    logging.disable(logging.WARNING)
    forget()
    try:
        PartialState(cpu=True)
        if "fsdp_plugin" in settings:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        yield Accelerator(**settings)
    finally:
        forget()
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def accelerate_fsdp2(kind: str, family: str, resume: str | None = None, save: str | None = None) -> dict[str, Any]:
    """The example under FSDP2: losses, whole weights at the end, and how many parameters are sharded."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    with accelerator(fsdp_plugin=plugin) as found:
        model, losses = example("accelerate_fsdp2").train(
            found,
            make(family),
            list(batches(dist.get_rank())),
            optimizer_of(kind),
            LR,
            resume=resume,
            save=(SAVE_AT, save) if save else None,
        )
        parameters = dict(model.named_parameters())
        weights = {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
        return {
            "losses": losses,
            "weights": weights,
            "sharded": sum(isinstance(p, DTensor) for p in parameters.values()),
        }


def whole(kind: str, family: str) -> dict[str, torch.Tensor]:
    """The same training by hand, on one process with the whole model and all ranks' batches."""
    from blockwise_lr import map_blocks
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    model = make(family)
    optimizer = optimizer_of(kind)(model.named_parameters(), lr=LR, weight_decay=0.1, block_map=map_blocks(model))
    schedule = BlockwiseWarmupCosine(optimizer, total_num_steps=STEPS, warmup_num_steps=STEPS // 10 + 1)
    for pair in zip(batches(0), batches(1)):
        for ids in pair:
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- torchtitan

TITAN = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5, "block_lr_ratios": {"preset": "paper", "qk": 8, "vo": 4}}


def _titan_model() -> Any:
    """torchtitan's llama3 with two layers of width 64, 4 query heads and 2 of k and v, in one fused weight."""
    from torchtitan.models.llama3 import Llama3Model, _build_llama3_layers, model_registry

    config: Llama3Model.Config = model_registry("debugmodel").model
    rope = config.layers[0].attention.rope
    rope.dim = 16
    config.layers = _build_llama3_layers(
        n_layers=2, dim=64, n_heads=4, n_kv_heads=2, hidden_dim=128, rope=rope, attn_backend="flex"
    )
    config.dim = config.tok_embeddings.embedding_dim = config.norm.normalized_shape = config.lm_head.in_features = 64
    model = config.build()
    own = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=own) * 0.1)
    return model


def _titan_gradients(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    own = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=own) for name, p in model.named_parameters()}


def titan(kind: str, steps: int = 4, saved_at: int = 2) -> dict[str, Any]:
    """torchtitan's model under FSDP2, stepped on given gradients by our container under torchtitan's own schedule.

    Returns:
        start and end: whole weights; resumed: the end of a second container that went on from the first one's flat state.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torchtitan.components.optimizer import LRSchedulersContainer

    schedule = LRSchedulersContainer.Config(warmup_steps=1, decay_type="linear")

    def built() -> tuple[Any, Any, Any]:
        model = _titan_model()
        for layer in model.layers.values():
            fully_shard(layer)
        fully_shard(model)
        config = example("torchtitan_optimizer").BlockwiseOptimizers.Config(kind=kind, options=options_of(kind, TITAN))
        container = config.build(model_parts=[model])
        return model, container, schedule.build(optimizers=container, training_steps=steps)

    def go(model: Any, container: Any, schedulers: Any, numbers: range) -> None:
        for number in numbers:
            for (_, p), gradient in zip(model.named_parameters(), _titan_gradients(model, number).values()):
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
            container.step()
            schedulers.step()
            container.zero_grad()

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}

    model, container, schedulers = built()
    start = weights(model)
    go(model, container, schedulers, range(saved_at))
    flat = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in container.state_dict().items()
    }
    position, middle = schedulers.state_dict(), {name: p.detach().clone() for name, p in model.named_parameters()}
    go(model, container, schedulers, range(saved_at, steps))
    again, second, later = built()
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(middle[name])
    second.load_state_dict(flat)
    later.load_state_dict(position)
    go(again, second, later, range(saved_at, steps))
    return {"start": start, "end": weights(model), "resumed": weights(again)}


def titan_by_hand(start: dict[str, torch.Tensor], steps: int = 4) -> dict[str, torch.Tensor]:
    """AdamW's formula on whole weights, each row at the rate of what it is, counted by hand."""
    ratios = {"tok_embeddings": 10, "lm_head": 10, "wo": 4, "feed_forward": 6, "norm": 1}
    group = [8.0] * 32 + [8.0] * 16 + [4.0] * 16  # two q heads, k, v of 16 rows each
    end = {}
    model = _titan_model()
    gradients = [_titan_gradients(model, step) for step in range(steps)]
    for name, value in start.items():
        ratio = (
            torch.tensor(group * 2)[:, None]
            if "wqkv" in name
            else next(float(ratio) for part, ratio in ratios.items() if part in name.replace("ffn_norm", "norm"))
        )
        decay = 0.0 if "norm" in name else 0.1
        p, m, v = value.double(), torch.zeros_like(value).double(), torch.zeros_like(value).double()
        for step in range(steps):
            factor = 1.0 if step < 2 else 1 - (step + 1 - 2) / (steps - 1)
            rate, g = 1e-3 * factor * ratio, gradients[step][name].double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-5)
            p = p * (1 - rate * decay) - rate * update
        end[name] = p.float()
    return end
