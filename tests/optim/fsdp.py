"""FSDP2 runs on the CPU; they run in the rank processes."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from kinds import KINDS, options_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from twins import make, token_ids

from blockwise_lr import BlockwiseAdamW, map_blocks

SETTINGS = {"lr": 2e-3, "eps": 1e-5}


def layers(model):
    inner = model.model if hasattr(model, "model") else getattr(model, "transformer", None) or model.gpt_neox
    return getattr(inner, "layers", None) or inner.h


def optimizer_of(model, kind: str, rules=None):
    block_map = map_blocks(model, rules=rules)
    return KINDS[kind].optimizer(model.named_parameters(), block_map=block_map, **options_of(kind, SETTINGS))


def step(model, optimizer, batch):
    """One step on every rank's micro batch (ranks, batch, length), gradients averaged."""
    losses = []
    for rank in range(len(batch)) if dist.get_world_size() == 1 else [dist.get_rank()]:
        loss = model(batch[rank], labels=batch[rank]).loss
        (loss / (len(batch) if dist.get_world_size() == 1 else 1)).backward()
        losses.append(float(loss.detach()))
    optimizer.step()
    optimizer.zero_grad()
    return losses


def train(kind: str, optimizer_kind: str, ranks: int, steps: int = 6) -> dict[str, torch.Tensor]:
    """Weights after some steps with every layer in its own FSDP unit; on one rank, of the unsharded model."""
    torch.manual_seed(0)
    model = make(kind)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model, optimizer_kind)
    for batch in token_ids(steps, 1, max(ranks, 2))[:, 0]:
        step(model, optimizer, batch)
    return {name: (p.full_tensor() if ranks > 1 else p).detach().clone() for name, p in model.named_parameters()}


def refuse_other_placements() -> str:
    """Sharding another dimension is refused on every rank before the first step."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(8, 4)})
    model["wte"].weight = torch.nn.Parameter(distribute_tensor(torch.zeros(8, 4), mesh, [Shard(1)]))
    try:
        BlockwiseAdamW(model.named_parameters(), block_map=map_blocks(model))
    except ValueError as error:
        return str(error)
    return ""


def shard_too_late() -> list[str]:
    """What is logged where the model is sharded after the optimizer was built."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("blockwise_lr.optim.base")
    log.addHandler(handler)
    torch.manual_seed(0)
    model = make("llama")
    optimizer = BlockwiseAdamW(model.named_parameters(), lr=1e-2, block_map=map_blocks(model))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ids = torch.arange(8)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    log.removeHandler(handler)
    return [text for text in said if "gradient" in text]
