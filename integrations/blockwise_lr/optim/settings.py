"""The optimizers' settings, checked: what users give in JSON or Python becomes learning rates and decays per block."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..blocks.layout import MATRIX
from ..blocks.types import BlockError, BlockType, block_values, lr_ratios
from .plan import StepClass


def checked_defaults(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, *,
                     block_lr_ratios: Mapping[str, float] | None, block_weight_decay: Mapping[str, float] | None,
                     decay_norms_and_biases: bool, min_lr: float | None) -> dict[str, Any]:
    """The defaults of a param group, plain numbers and strings only, so that a state dict stays loadable everywhere.

    Raises:
        BlockError: a value out of range, an unknown block type, min_lr above lr.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not _finite(value) or value < 0:
            raise BlockError(f"{name} is {value!r}; give a finite number, 0 or above")
    if len(betas) != 2 or not all(_finite(beta) and 0 <= beta < 1 for beta in betas):
        raise BlockError(f"betas are {betas!r}; give two numbers, 0 or above and below 1")
    if min_lr is not None and (not _finite(min_lr) or not 0 <= min_lr <= lr):
        raise BlockError(f"min_lr is {min_lr!r} and lr is {float(lr)!r}; give a min_lr from 0 up to lr")
    ratios = {block.value: ratio for block, ratio in lr_ratios(block_lr_ratios).items()}
    decays = {block.value: decay for block, decay in
              block_values(block_weight_decay, "block_weight_decay", positive=False).items()}
    return dict(lr=lr, betas=(float(betas[0]), float(betas[1])), eps=eps, weight_decay=weight_decay, min_lr=min_lr,
                lr_floor=0.0, block_lr_ratios=ratios, block_weight_decay=decays,
                decay_norms_and_biases=bool(decay_norms_and_biases), group_decay=False)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def checked_fade(steps: Any) -> int:
    """The ``ratio_fade_steps`` setting, checked.

    Raises:
        BlockError: not a whole number, 0 or above.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise BlockError(f"ratio_fade_steps is {steps!r}; give a whole number of optimizer steps, 0 or above")
    return steps


def advance_fade(group: dict[str, Any], step: int) -> None:
    """Tells a group whose ratios fade from a loaded checkpoint's to its own which step is about to be taken."""
    fade = group.get("ratio_fade")
    if fade:
        fade["at"] = step
        if step - fade["start"] > fade["steps"]:
            del group["ratio_fade"]


def ratio_now(group: Mapping[str, Any], block: BlockType) -> float:
    """A block type's ratio in a param group, also while it fades from a loaded checkpoint's."""
    ratio, fade = group["block_lr_ratios"][block.value], group.get("ratio_fade")
    if not fade:
        return ratio
    before = fade["from"][block.value]
    return before + (ratio - before) * min((fade["at"] - fade["start"]) / fade["steps"], 1.0)


def group_lr(group: Mapping[str, Any], block: BlockType) -> float:
    """The learning rate of a block type in a param group now.

    ``block_lrs``, where a scheduler sets it, states it per block type. Otherwise it follows ``lr``, the base learning
    rate, which any scheduler may set: lr_floor + ratio * (lr - lr_floor). With the floor at 0, as schedulers that know
    nothing of blocks leave it, that is ratio * lr; the paper's schedule lets all block types end at the same min_lr by
    raising the floor as it decays.
    """
    stated = (group.get("block_lrs") or {}).get(block.value)
    if stated is not None:
        return float(stated)
    floor = float(group["lr_floor"])
    return floor + ratio_now(group, block) * (float(group["lr"]) - floor)


def class_decay(group: Mapping[str, Any], of: StepClass) -> float:
    """The weight decay of elements of a class in a param group.

    A ``weight_decay`` that the user put on a group of their own holds for all of it. Otherwise block_weight_decay, and
    weight_decay for block types it does not name; norms and biases are not decayed unless decay_norms_and_biases or,
    for norms, block_weight_decay["norm"] says so.
    """
    if group["group_decay"]:
        return float(group["weight_decay"])
    stated = group["block_weight_decay"].get(of.block.value)
    undecayed = of.kind != MATRIX and not group["decay_norms_and_biases"]
    if undecayed and not (of.block is BlockType.NORM and stated is not None):
        return 0.0
    return float(group["weight_decay"] if stated is None else stated)
