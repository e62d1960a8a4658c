"""DeepSpeed engines with Muon beside torch.optim.Muon and beside one process; runs in the rank processes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from deepspeed_door.engines import BETAS, DECAY, EPS, LR, config, reference, start, train, trained, weights
from deepspeed_door.own_gradients import Follower
from deepspeed_door.test_checkpoint import loaded_and_continued, resumed, saved_and_continued
from twins import make

import blockwise_lr
from blockwise_lr import map_blocks

RATIOS = {"embedding": 10.0, "head": 10.0, "qk": 1.5, "vo": 0.5, "ffn": 1.0, "norm": 1.0}
OURS = {"block_lr_ratios": {"qk": 1.5, "vo": 0.5}}


def farthest(found: dict, wanted: dict, start: dict) -> float:
    """The largest difference of any parameter, over how far it has gone."""
    return max(float((found[n] - wanted[n]).norm() / (wanted[n] - start[n]).norm()) for n in wanted)


class Alone(Follower):
    """Beside torch's optimizers, ours in one process on whole parameters, at the engine's rates."""

    def __init__(self, engine: Any, model_kind: str, kind: str, steps: int) -> None:
        super().__init__(engine, model_kind, kind, steps, RATIOS)
        self.first = weights(engine)
        self.model = make(model_kind)
        self.model.load_state_dict(self.first, strict=False)
        self.alone = getattr(blockwise_lr, kind)(
            self.model.named_parameters(),
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            kernel="reference",
            block_map=map_blocks(self.model),
            **OURS,
        )

    def follow(self, given: dict[str, torch.Tensor]) -> None:
        super().follow(given)
        for name, p in self.model.named_parameters():
            p.grad = given[name].clone()
        (rates,) = self.optimizer.param_groups
        self.alone.param_groups[0].update({key: rates[key] for key in ("lr", "block_lrs", "block_lrs_at")})
        self.alone.step()


def beside(kind: str, model_kind: str, stage: int, options: dict[str, Any], steps: int = 5) -> dict[str, Any]:
    """Of an engine whose optimizer and the others get the same gradients: how far it is from torch's, the matrices that are
    not those of ours in one process to the bit, and how far the rest is from these."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes in half on any CPU; DeepSpeed wants it native
    settings = config(kind, stage, steps=steps, optimizer={**OURS, "kernel": "reference"}, **options)
    engine = start(make(model_kind), settings)
    both = Alone(engine, model_kind, kind, steps)
    train(engine, steps)
    found, alone = weights(engine), {n: p.detach() for n, p in both.model.named_parameters()}
    hidden = {n for n, p in both.model.named_parameters() if both.alone.is_matrix(p)}
    flats = engine.basic_optimizer.shards.flats
    cut = {f.name for _, fragments in flats for f in fragments if f.numel < alone[f.name].numel()} & hidden
    engine.destroy()
    assert both.number == steps
    return {
        "from_torch": farthest(found, both.weights(), both.first),
        "unlike": [n for n in hidden if not torch.equal(found[n], alone[n])],
        "rest": max(float((found[n] - alone[n]).norm() / alone[n].norm()) for n in alone if n not in hidden),
        "cut": len(cut),
    }


def end_to_end(kind: str, model_kind: str, stage: int, options: dict[str, Any], steps: int = 5) -> float:
    """How far a run with clipping and micro batches is from the twin's in one process."""
    found = trained(model_kind, config(kind, stage, steps=steps, optimizer=OURS, **options), steps)
    ranks = dist.get_world_size()
    wanted = reference(model_kind, kind, steps, ranks, ratios=RATIOS)
    return farthest(found, wanted, {n: p.detach() for n, p in make(model_kind).named_parameters()})


def going_on(kind: str, model_kind: str, stage: int, options: dict[str, Any], folder: str, universal: bool) -> Any:
    return resumed(kind, model_kind, stage, {"optimizer": OURS, **options}, folder, universal)


def saved(kind: str, model_kind: str, stage: int, options: dict[str, Any], folder: str) -> Any:
    return saved_and_continued(kind, model_kind, stage, {"optimizer": OURS, **options}, folder)


def loaded(kind: str, model_kind: str, stage: int, options: dict[str, Any], folder: str) -> Any:
    assert os.path.isdir(folder)
    return loaded_and_continued(kind, model_kind, stage, {"optimizer": OURS, **options}, folder)[0]


def cut_by_autotp() -> None:
    start(make("llama"), config("BlockwiseMuon", 1, tensor_parallel={"autotp_size": 2}))
