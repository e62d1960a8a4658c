"""Runs with clipping by block type; in the rank processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed_door.engines import ACCUMULATION, BETAS, DECAY, EPS, LR, MIN_LR, WARMUP, config, trained
from kinds import KINDS
from references import once
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from twins import RATIOS, REFERENCES, Twin, clip_blocks, make, paper_lr, token_ids, worst_difference

from blockwise_lr import BlockType, map_blocks

LIMITS = {"embedding": 0.05, "qk": 1e-3, "ffn": 0.02, "norm": 1e-3}
STEPS = 8


PERCENTILES = {"embedding": "50%", "qk": "20%", "ffn": 0.02, "norm": "100%"}


@once
def reference(
    model_kind: str, kind: str, ranks: int, global_norm: float, limits: tuple[tuple[str, float | str], ...]
) -> dict[str, torch.Tensor]:
    """The unfused twin in one process."""
    twin, norms = Twin(model_kind, make(model_kind)), {}
    optimizer = REFERENCES[kind](twin, BETAS, EPS, DECAY, RATIOS)
    for number, batch in enumerate(token_ids(STEPS, ACCUMULATION, ranks), 1):
        for part in batch:
            for ids in part:
                twin.backward(ids, 1 / (ACCUMULATION * ranks))
        if global_norm:
            twin.clip(global_norm)
        clip_blocks(twin, dict(limits), norms)
        optimizer.step(lambda ratio: paper_lr(number, ratio, LR, MIN_LR, WARMUP, STEPS))
    return {name: value.detach() for name, value in twin.values().items()}


def in_deepspeed(
    model_kind: str, kind: str, stage: int, zero: dict, global_norm: float, limits: dict[str, float | str]
) -> tuple[float, float]:
    """How far from the twin, and how far from the twin without clipping."""
    settings = config(
        kind, stage, steps=STEPS, zero=zero, optimizer={"block_clip": limits}, gradient_clipping=global_norm
    )
    wanted = reference(model_kind, kind, dist.get_world_size(), global_norm, tuple(limits.items()))
    unclipped = trained(model_kind, config(kind, stage, steps=STEPS, zero=zero, gradient_clipping=global_norm), STEPS)
    found = trained(model_kind, settings, STEPS)
    return worst_difference(found, wanted, kind), worst_difference(found, unclipped, kind)


def in_stages() -> None:
    """An engine whose ranks hold different parameters."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed_door.engines import start

    layers = [LayerSpec(torch.nn.Embedding, 8, 4), LayerSpec(torch.nn.LayerNorm, 4)]
    rules = [{"match": "*", "block": "ffn"}]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, _: out.sum())
    start(model, config("BlockwiseAdamW", 0, optimizer={"block_clip": LIMITS, "block_rules": rules}))


def in_fsdp(model_kind: str, kind: str) -> tuple[float, float]:
    """The worst difference of any weight from the twin's after some steps, whose rates are constant, and the norms'."""
    model, ranks = make(model_kind), dist.get_world_size()
    twin = Twin(model_kind, make(model_kind))
    plain = REFERENCES[kind](twin, BETAS, EPS, 0.1, RATIOS)
    mesh = init_device_mesh("cpu", (ranks,))
    if ranks > 1:
        for part in model.model.layers:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ours = KINDS[kind].optimizer(
        model.named_parameters(),
        lr=LR,
        weight_decay=0.1,
        block_map=map_blocks(model),
        block_clip=LIMITS,
        block_lr_ratios="paper",
        betas=BETAS,
        eps=EPS,
    )
    apart = 0.0
    for batch in token_ids(STEPS, 1, ranks)[:, 0]:
        ids = batch[dist.get_rank()]
        model(ids, labels=ids).loss.backward()
        for part in batch:
            twin.backward(part, 1 / ranks)
        norms = {
            block: float(
                sum((leaf.tensor.grad**2).sum() for leaf in twin.leaves.values() if leaf.block == block) ** 0.5
            )
            for block in LIMITS
        }
        clip_blocks(twin, LIMITS)
        ours.step()
        found = dict(zip((block.value for block in BlockType), ours.clip.norms.tolist()))
        apart = max(apart, *(abs(found[block] / norm - 1) for block, norm in norms.items()))
        plain.step(lambda ratio: ratio * LR)
        ours.zero_grad()
    found = {n: (p.full_tensor() if ranks > 1 else p).detach() for n, p in model.named_parameters()}
    return worst_difference(found, {n: v.detach() for n, v in twin.values().items()}, kind), apart
