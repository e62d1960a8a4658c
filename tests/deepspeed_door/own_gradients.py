"""The plain optimizer, given the gradients that an engine's optimizer steps from: no rounding of a forward or backward
pass stands between the two, in any dtype and on any machine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed_door.engines import BETAS, DECAY, EPS, LR, MIN_LR, WARMUP, config, start, train, weights
from twins import RATIOS, REFERENCES, Twin, make, paper_lr, worst_difference


class Follower:
    """The unfused twin with an engine's fp32 weights, stepped by the plain optimizer whenever the engine's steps."""

    def __init__(self, engine: Any, model_kind: str, kind: str, steps: int, ratios: dict[str, float] = RATIOS) -> None:
        model = make(model_kind)
        model.load_state_dict(weights(engine), strict=False)  # tied weights have one name in the engine
        self.twin, self.shapes = Twin(model_kind, model), {name: p.shape for name, p in model.named_parameters()}
        self.plain = REFERENCES[kind](self.twin, BETAS, EPS, DECAY, ratios)
        self.steps, self.number = steps, 0
        self.optimizer = engine.basic_optimizer
        self.optimizer.register_step_pre_hook(lambda *_: self.follow(self._gradients()))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self.twin.values().items()}

    def follow(self, given: dict[str, torch.Tensor]) -> None:
        """One step with the whole gradients."""
        with (
            torch.enable_grad()
        ):  # BF16_Optimizer steps without; the leaves' gradients are what autograd makes of these
            sum((value * given[name]).sum() for name, value in self.twin.values().items()).backward()
        self.number += 1
        self.plain.step(lambda ratio: paper_lr(self.number, ratio, LR, MIN_LR, WARMUP, self.steps))

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Whole, from all ranks' shards."""
        own = [
            (fragment.name, fragment.start, tensor.grad.reshape(-1)[fragment.offset :][: fragment.numel].clone().cpu())
            for tensor, fragments in self.optimizer.shards.flats
            for fragment in fragments
        ]
        found = {name: torch.full((shape.numel(),), float("nan")) for name, shape in self.shapes.items()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        for name, begin, value in (piece for pieces in ranks for piece in pieces):
            found[name][begin : begin + len(value)] = value.float()
        return {name: value.view(self.shapes[name]) for name, value in found.items()}


def followed(kind: str, model_kind: str, stage: int, options: dict[str, Any], steps: int = 10) -> tuple[float, int]:
    """The worst relative difference of any tensor from the follower's, and how many steps it followed."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes in half on any CPU; DeepSpeed wants it native
    engine = start(make(model_kind), config(kind, stage, steps=steps, **options))
    follower = Follower(engine, model_kind, kind, steps)
    train(engine, steps)
    found = weights(engine)
    engine.destroy()
    return worst_difference(found, follower.weights()), follower.number
