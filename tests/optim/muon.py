"""Runs of Muon and its reference: torch.optim.Muon on the unfused twin's leaves, torch's AdamW for the rest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from twins import Twin, make, token_ids

from blockwise_lr import BlockwiseMuon, map_blocks

LR, DECAY, BETAS, EPS, STEPS = 2e-3, 0.1, (0.9, 0.95), 1e-5, 4
RATIOS = {"embedding": 10.0, "head": 10.0, "qk": 1.5, "vo": 0.5, "ffn": 1.0, "norm": 1.0}
OURS = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS, "block_lr_ratios": {"qk": 1.5, "vo": 0.5}}


class Plain:
    """Of a twin, in one process."""

    def __init__(self, twin: Twin, scale: str) -> None:
        matrices, rest = [], []
        for leaf in twin.leaves.values():
            hidden = leaf.block in ("qk", "vo", "ffn") and leaf.tensor.dim() == 2
            group = {
                "params": [leaf.tensor],
                "lr": LR * RATIOS[leaf.block],
                "weight_decay": DECAY if leaf.decayed else 0.0,
            }
            (matrices if hidden else rest).append(group)
        self.parts = [torch.optim.Muon(matrices, adjust_lr_fn=scale), torch.optim.AdamW(rest, betas=BETAS, eps=EPS)]

    def step(self) -> None:
        for part in self.parts:
            part.step()
            part.zero_grad()


def followed(model_kind: str, scale: str = "match_rms_adamw") -> dict[str, float]:
    """Parameter -> how far from the twin, over how far both have gone."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model, twin = make(model_kind), Twin(model_kind, make(model_kind))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ours = BlockwiseMuon(model.named_parameters(), block_map=map_blocks(model), matrix_scale=scale, **OURS)
    plain = Plain(twin, scale)
    for batch in token_ids(STEPS, 1, ranks)[:, 0]:
        ids = batch[dist.get_rank() if ranks > 1 else 0]
        model(ids, labels=ids).loss.backward()
        for part in batch:
            twin.backward(part, 1 / ranks)
        ours.step()
        plain.step()
        ours.zero_grad()
    wanted = {name: value.detach() for name, value in twin.values().items()}
    found = {n: (p.full_tensor() if ranks > 1 else p).detach() for n, p in model.named_parameters()}
    return {n: float((found[n] - wanted[n]).norm() / (wanted[n] - start[n]).norm()) for n in wanted}


def in_deepspeed(stage: int) -> float:
    """The worst difference from training in one process, of a DeepSpeed engine of stage 0."""
    from deepspeed_door.engines import ACCUMULATION, config, start, train, weights

    engine = start(
        make("llama"), config("BlockwiseMuon", stage, optimizer={"lr": LR}, steps=STEPS, gradient_clipping=0.0)
    )
    train(engine, STEPS)
    found = weights(engine)
    engine.destroy()
    model = make("llama")
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = BlockwiseMuon(model.named_parameters(), lr=LR, eps=EPS, min_lr=1e-4, block_map=map_blocks(model))
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    schedule = BlockwiseWarmupCosine(ours, STEPS, 3)
    ranks = dist.get_world_size()
    for batch in token_ids(STEPS, ACCUMULATION, ranks):
        for ids in batch.flatten(0, 1):
            (model(ids, labels=ids).loss / (ACCUMULATION * ranks)).backward()
        ours.step()
        schedule.step()
        ours.zero_grad()
    return max(
        float((found[n] - p.detach()).norm() / (p.detach() - first[n]).norm()) for n, p in model.named_parameters()
    )
