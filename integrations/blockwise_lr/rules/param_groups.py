"""What a param group says becomes learning rates and weight decays per block type.

A block's learning rate is said in one place: ``group["lr"]``, the base rate that any scheduler may set, times the block's
ratio. A schedule that knows blocks may state every block's rate instead (:func:`state_block_lrs`); what it stated holds
only as long as ``lr`` is what it set along with it. So whoever sets ``lr`` afterwards, another scheduler, a resume or a
user who writes 0, is followed, and rates cannot be made up of numbers that do not belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..blocks.layout import MATRIX, Rate
from ..blocks.types import BlockError, BlockType
from ..plan.step_plan import StepClass

STATED, STATED_AT = "block_lrs", "block_lrs_at"
LOWERED = "lowered_lr"
LOWEST = ".lowest"  # behind a block's name: its lowest rate, where rules scale it differently


def advance(group: dict[str, Any], step: int) -> None:
    """Tells a group which step is about to be taken: ratios may fade from a loaded checkpoint's to its own, and rates may be
    lowered for a while."""
    fade, lowered = group.get("ratio_fade"), group.get(LOWERED)
    if fade:
        fade["at"] = step
        if step - fade["start"] > fade["steps"]:
            del group["ratio_fade"]
    if lowered and step > lowered["until"]:
        del group[LOWERED]


def lower(group: dict[str, Any], factor: float, until: int) -> None:
    """Multiplies all rates of a group by a factor, up to and including a step; in place of one that still holds."""
    group[LOWERED] = {"factor": factor, "until": until}


def ratio_now(group: Mapping[str, Any], block: str) -> float:
    """The ratio of a block type (its value) or of an own block in a param group, also while it fades from a loaded
    checkpoint's; a block that the checkpoint did not have has its ratio at once."""
    ratio, fade = group["block_lr_ratios"][block], group.get("ratio_fade")
    if not fade:
        return ratio
    before = fade["from"].get(block, ratio)
    return before + (ratio - before) * min((fade["at"] - fade["start"]) / fade["steps"], 1.0)


def change_ratios(group: dict[str, Any], ratios: Mapping[str, float]) -> None:
    """Sets a group's ratios; block rates that a schedule has stated move along, and a fade from older ratios ends."""
    stated = group.get(STATED)
    if stated:
        now = {block: ratio_now(group, block) for block in stated}
        group[STATED] = {block: rate * ratios[block] / now[block] for block, rate in stated.items()}
    group["block_lr_ratios"] = dict(ratios)
    group.pop("ratio_fade", None)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Sets a group's base learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def state_block_lrs(group: dict[str, Any], rates: Mapping[str, float]) -> None:
    """States the rate of every block type and own block while ``lr`` is what it is now.

    Raises:
        BlockError: a rate below 0 or not finite.
    """
    for block, rate in rates.items():
        _refuse_bad_rate(rate, f"the rate stated for {block}")
    group[STATED], group[STATED_AT] = {str(block): float(rate) for block, rate in rates.items()}, float(group["lr"])


def group_lr(group: Mapping[str, Any], rate: Rate) -> float:
    """The learning rate in a param group now, times the rate's factor: stated together with this ``lr``, or else ratio * lr;
    lower while :func:`lower` says so.

    Raises:
        BlockError: ``lr`` is below 0 or not finite, as a faulty scheduler may have left it.
    """
    lr = float(group["lr"])
    _refuse_bad_rate(lr, "lr")
    scale = rate.scale * group[LOWERED]["factor"] if group.get(LOWERED) else rate.scale
    if group.get(STATED_AT) == lr:
        stated = group[STATED].get(rate.block)
        if stated is not None:
            return float(stated) * scale
    return ratio_now(group, rate.block) * lr * scale


def block_lrs(group: Mapping[str, Any], rates: Iterable[Rate]) -> dict[str, float]:
    """The learning rates now by block: the highest, and as ``<block>.lowest`` the lowest where rules scale it differently."""
    found = {}
    for block, (lowest, highest) in rates_by_block(rates, lambda rate: group_lr(group, rate)).items():
        found[block] = highest
        if lowest < highest:
            found[block + LOWEST] = lowest
    return found


def rates_by_block(rates: Iterable[Rate], lr_of: Callable[[Rate], float]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest learning rate of every block, in the order of its first."""
    found: dict[str, tuple[float, float]] = {}
    for rate in rates:
        lr = lr_of(rate)
        lowest, highest = found.get(rate.block, (lr, lr))
        found[rate.block] = min(lowest, lr), max(highest, lr)
    return found


def _refuse_bad_rate(rate: float, what: str) -> None:
    if not math.isfinite(rate) or rate < 0:
        raise BlockError(
            f"{what} is {rate!r}; a learning rate is a finite number, 0 or above, so correct the scheduler or "
            f'the code that sets param_groups[...]["lr"]'
        )


def class_decay(group: Mapping[str, Any], of: StepClass) -> float:
    """The weight decay of elements of a class in a param group.

    A ``weight_decay`` that the user put on a group of their own holds for all of it. Otherwise block_weight_decay, and
    weight_decay for block types it does not name (an own block's name goes before the type); norms and biases are not
    decayed unless decay_norms_and_biases or, for norms, block_weight_decay["norm"] says so.

    Raises:
        BlockError: it is below 0 or not finite.
    """
    decay = _class_decay(group, of)
    if not math.isfinite(decay) or decay < 0:
        raise BlockError(f"weight_decay is {decay!r} in a param group; give a finite number, 0 or above")
    return decay


def _class_decay(group: Mapping[str, Any], of: StepClass) -> float:
    if group["group_decay"]:
        return float(group["weight_decay"])
    said = group["block_weight_decay"]
    of_type = said.get(of.block.value)
    if of.kind != MATRIX and not group["decay_norms_and_biases"]:
        return float(of_type) if of.block is BlockType.NORM and of_type is not None else 0.0
    stated = said.get(of.own, of_type) if of.own else of_type
    return float(group["weight_decay"] if stated is None else stated)
