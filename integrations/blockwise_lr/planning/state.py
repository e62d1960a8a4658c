"""Bytes of parameters, gradients and optimizer states that a rank of DeepSpeed's ZeRO holds, before anything is started.

The cuts are DeepSpeed's: stages 1 and 2 lay a param group's parameters one after another, in a buffer whose end is padded to
two elements a rank, and cut it evenly; stage 3 cuts every parameter evenly by itself. Moments follow from the same step
plans that the optimizers use, so that Adam-mini's are counted by segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..blocks import BlockError, BlockMap, ParamLayout
from ..plan.shards import Fragment, fragments_within
from ..plan.step_plan import segment_plan
from ..rules import RULES
from ..rules.base import UpdateRule

_ALIGNMENT = 2  # elements per rank that DeepSpeed pads a flat buffer to
_FLOAT32 = 4
PRECISIONS = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class StateBytes:
    """Of one rank.

    Attributes:
        parameters: as the forward pass uses them; of ZeRO-3 those that stay.
        gradients: of parameters' precision, those that stay until the step.
        masters: float32 copies that the optimizer steps.
        moments: the optimizer's states, float32.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.masters + self.moments


def state_bytes(
    block_map: BlockMap, *, stage: int, ranks: int, rank: int = 0, optimizer: str = "adamw", precision: str = "bf16"
) -> StateBytes:
    """What a rank holds.

    Args:
        block_map: of the whole model, whose parameters are all trained and in one param group.
        stage: ZeRO's, 0 to 3.
        ranks: that share the states (data parallel).
        rank: which of them.
        optimizer: a rule's name: adamw, adam_mini, lion.
        precision: "bf16" or "fp32" of parameters and gradients; masters and moments are float32.

    Raises:
        BlockError: a value out of range, or Adam-mini without the number of heads.
    """
    rule = _checked(stage, ranks, rank, optimizer, precision)
    layouts = [rule.segments(layout, "element") for layout in block_map.values()]
    whole = sum(layout.numel for layout in layouts)
    if stage in (1, 2):
        held, fragments = _of_one_buffer(layouts, ranks, rank)
    elif stage == 3:
        held, fragments = _of_every_parameter(layouts, ranks, rank)
    else:
        held, fragments = whole, [Fragment(layout.name, 0, layout.numel, 0) for layout in layouts]
    width = PRECISIONS[precision]
    has_masters = precision == "bf16" or stage > 0
    return StateBytes(
        width * (held if stage == 3 else whole),
        width * (held if stage >= 2 else whole),
        _FLOAT32 * held if has_masters else 0,
        _FLOAT32 * _moments(rule, held, fragments, layouts),
    )


def peak_bytes(states: StateBytes, stage: int, gradients: int, others: int) -> int:
    """The most that a step takes: in the passes, or when all gradients are there.

    Args:
        states: of the rank.
        stage: ZeRO's; from 2 on, gradients that other ranks keep go as soon as they are made.
        gradients: of parameters, when the passes take the most.
        others: activations and temporaries then.
    """
    made = states.gradients if stage >= 2 else gradients
    return states.total - states.gradients + max(states.gradients, made + others)


def largest_state_bytes(block_map: BlockMap, *, stage: int, ranks: int, **options: str) -> StateBytes:
    """What the rank with the most holds, of up to 16 that are looked at (all of them where there are no more)."""
    looked_at = sorted({round(i * (ranks - 1) / 15) for i in range(16)})
    found = [state_bytes(block_map, stage=stage, ranks=ranks, rank=rank, **options) for rank in looked_at]
    return max(found, key=lambda one: one.total)


def _checked(stage: int, ranks: int, rank: int, optimizer: str, precision: str) -> UpdateRule:
    if stage not in (0, 1, 2, 3):
        raise BlockError(f"ZeRO's stage is {stage}; give 0, 1, 2 or 3")
    if ranks < 1 or not 0 <= rank < ranks:
        raise BlockError(f"rank {rank} of {ranks}; give at least one rank, and one of them")
    if optimizer not in RULES:
        raise BlockError(f"the optimizer is {optimizer!r}; use one of {', '.join(RULES)}")
    if precision not in PRECISIONS:
        raise BlockError(f"the precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    return RULES[optimizer]


def _of_one_buffer(layouts: Sequence[ParamLayout], ranks: int, rank: int) -> tuple[int, list[Fragment]]:
    whole = sum(layout.numel for layout in layouts)
    size = -(-whole // (_ALIGNMENT * ranks)) * _ALIGNMENT
    ends = itertools.accumulate(layout.numel for layout in layouts)
    places = [(layout.name, end - layout.numel, layout.numel) for layout, end in zip(layouts, ends)]
    return size, fragments_within(places, rank * size, size)


def _of_every_parameter(layouts: Sequence[ParamLayout], ranks: int, rank: int) -> tuple[int, list[Fragment]]:
    offset, fragments = 0, []
    for layout in layouts:
        size = -(-layout.numel // ranks)
        held = min(size, layout.numel - rank * size)
        if held > 0:
            fragments.append(Fragment(layout.name, rank * size, held, offset))
        offset += size
    return offset, fragments


def _moments(rule: UpdateRule, held: int, fragments: Sequence[Fragment], layouts: Sequence[ParamLayout]) -> int:
    """Elements of all states of a rank."""
    found = held * len(rule.element_states)
    if rule.segment_state is not None:
        by_name = {layout.name: layout for layout in layouts}
        found += segment_plan(held, fragments, [by_name[fragment.name] for fragment in fragments]).slots
    return found
