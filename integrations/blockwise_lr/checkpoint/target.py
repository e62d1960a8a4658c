"""What loading and saving need of an optimizer and of the framework around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from ..blocks import BlockMap
from ..plan.shards import Fragment
from ..plan.step_plan import StepPlan
from ..rules.base import UpdateRule
from .matching import Contents

if TYPE_CHECKING:
    from .record import Record


def in_parameters(keys: Sequence[str]) -> str:
    """What to write where the optimizer's parameters are stated, to accept differences."""
    listed = ", ".join(f'"{key}"' for key in keys)
    return f'add "accept_mismatch": [{listed}] to the optimizer\'s parameters'


@dataclass(frozen=True)
class SavePolicy:
    """How a framework saves and loads the states of an optimizer it has wrapped; the defaults are plain PyTorch's.

    Attributes:
        recorded_map: what the record tells of the model, where that is not the optimizer's own block map: the whole model's,
            of which this rank has a part.
        unrecorded_settings: settings of param groups that the framework itself keeps and compares. With any, the groups are
            the framework's own making and the record has the first one's settings for all.
        row_parts: in how many segments Adam-mini cuts the rows that tensor-parallel ranks hold parts of.
        element_form: segment states are saved spread over elements, of the parameter's shape.
        step_in_param_groups: param groups are saved with the step count too.
        external_state: the framework saves and loads the states' tensors itself; only steps come with param groups.
        collective_load: all ranks load at the same time, and hear of each other's errors.
        mismatch_hint: what a user writes to accept differences, given their names.
    """

    recorded_map: BlockMap | None = None
    unrecorded_settings: tuple[str, ...] = ()
    row_parts: int = 1
    element_form: bool = False
    step_in_param_groups: bool = False
    external_state: bool = False
    collective_load: bool = False
    mismatch_hint: Callable[[Sequence[str]], str] = field(default=in_parameters)


class RestoreTarget(Protocol):
    """An optimizer that states are loaded into."""

    rule: ClassVar[UpdateRule]
    param_groups: list[dict[str, Any]]
    block_map: BlockMap
    accept_mismatch: tuple[str, ...]
    ratio_fade_steps: int
    initial_settings: list[dict[str, Any]]
    saving: SavePolicy

    def all_tensors(self) -> list[torch.Tensor]: ...

    def contents(self) -> list[list[Contents]]: ...

    def record(self) -> Record: ...

    def plan_of(self, tensor: torch.Tensor) -> StepPlan: ...

    def fragments_of(self, tensor: torch.Tensor) -> list[Fragment]: ...


class SegmentTarget(RestoreTarget, Protocol):
    """One whose rule keeps a state per segment."""

    def all_reduce_shared(self, sums: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]: ...
