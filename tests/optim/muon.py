"""Runs of Muon and its reference: torch.optim.Muon on the unfused twin's leaves, torch's AdamW for the rest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from twins import REFERENCES, Twin, make, token_ids

import blockwise_lr
from blockwise_lr import BlockwiseMuon, map_blocks
from blockwise_lr.optim import Fragment, ShardBoundaries, ShardMap, matrix_exchange

LR, DECAY, BETAS, EPS, STEPS = 2e-3, 0.1, (0.9, 0.95), 1e-5, 4
RATIOS = {"embedding": 10.0, "head": 10.0, "qk": 1.5, "vo": 0.5, "ffn": 1.0, "norm": 1.0}
OURS = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS, "block_lr_ratios": {"qk": 1.5, "vo": 0.5}}


def followed(
    model_kind: str, scale: str = "match_rms_adamw", kind: str = "BlockwiseMuon", mesh_shape: tuple[int, ...] = ()
) -> dict[str, float]:
    """Parameter -> how far from the twin, over how far both have gone."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model, twin = make(model_kind), Twin(model_kind, make(model_kind))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if ranks > 1:
        shape = mesh_shape or (ranks,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    cls = getattr(blockwise_lr, kind)
    ours = cls(model.named_parameters(), block_map=map_blocks(model), matrix_scale=scale, **OURS)
    plain = REFERENCES[kind](twin, BETAS, EPS, DECAY, RATIOS, scale)
    for batch in token_ids(STEPS, 1, ranks)[:, 0]:
        ids = batch[dist.get_rank() if ranks > 1 else 0]
        model(ids, labels=ids).loss.backward()
        for part in batch:
            twin.backward(part, 1 / ranks)
        ours.step()
        plain.step(lambda ratio: LR * ratio)
        ours.zero_grad()
    wanted = {name: value.detach() for name, value in twin.values().items()}
    found = {n: (p.full_tensor() if ranks > 1 else p).detach() for n, p in model.named_parameters()}
    return {n: float((found[n] - wanted[n]).norm() / (wanted[n] - start[n]).norm()) for n in wanted}


def cut_anywhere(model_kind: str, seed: int, limit: int) -> list[str]:
    """The parameters that are not those of whole steps to the bit, of a model that lies cut at random places in one flat
    tensor on each rank.

    Args:
        limit: elements of the matrices that a rank may own in a round.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    whole, model = make(model_kind), make(model_kind)
    places, total = [], 0
    for name, p in model.named_parameters():
        places.append((name, total, p.numel()))
        total += p.numel()
    edges = [0, *sorted((torch.randperm(total - 1, generator=generator)[: ranks - 1] + 1).tolist()), total]
    boundaries, fragments = {}, []
    for name, start, numel in places:
        inside = [edge - start for edge in edges if start < edge < start + numel]
        first = max(number for number, edge in enumerate(edges) if edge <= start)
        if inside:
            boundaries[name] = ShardBoundaries(torch.tensor(inside).numpy(), first_rank=first)
        low, high = max(start, edges[rank]), min(start + numel, edges[rank + 1])
        if low < high:
            fragments.append(Fragment(name, low - start, high - low, low - edges[rank]))
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])[edges[rank] : edges[rank + 1]].clone()
    options = {"block_map": map_blocks(model), "kernel": "reference", **OURS}
    ours = BlockwiseMuon(model.named_parameters(), **options)
    ours.param_groups[0]["params"] = [flat]
    ours.attach_shards(ShardMap([(flat, fragments)], boundaries))
    alone = BlockwiseMuon(whole.named_parameters(), **{**options, "block_map": map_blocks(whole)})
    before, matrix_exchange.ROUND = matrix_exchange.ROUND, limit
    try:
        for _ in range(3):
            for p in whole.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            flat.grad = torch.cat([p.grad.reshape(-1) for p in whole.parameters()])[edges[rank] : edges[rank + 1]]
            ours.step()
            alone.step()
    finally:
        matrix_exchange.ROUND = before
    wanted = dict(whole.named_parameters())
    return [
        f.name
        for f in fragments
        if not torch.equal(flat[f.offset :][: f.numel], wanted[f.name].reshape(-1)[f.start :][: f.numel])
    ]
