"""State dicts of the blockwise optimizers: what they hold, what they say of their origin, and how they are loaded."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from .._version import __version__
from ..blocks.block_map import BlockMap, plain_name
from ..blocks.layout import ParamLayout
from ..checkpoint.matching import Contents, merged
from ..checkpoint.moments import expand_segments
from ..checkpoint.record import ELEMENTS, KEY, SEGMENTS, UNITS, Record, plain_layouts
from ..checkpoint.restore import prepare_state_dict
from ..checkpoint.target import SavePolicy
from ..checkpoint.units import UnitMoments
from ..plan.dtensor import like
from ..plan.shards import Fragment, ShardMap
from ..plan.step_plan import StepPlan
from ..rules.base import UpdateRule


class Saving(torch.optim.Optimizer):
    """The part of :class:`~blockwise_lr.optim.base.BlockwiseOptimizer` that saves and loads; that class has what is only
    declared here."""

    RECORD_KEY = KEY

    rule: ClassVar[UpdateRule]
    block_map: BlockMap
    bias_segments: str | None
    initial_settings: list[dict[str, Any]]
    accept_mismatch: tuple[str, ...]
    ratio_fade_steps: int
    shards: ShardMap | None
    _fragments: WeakIdKeyDictionary
    _placed: WeakIdKeyDictionary

    def all_tensors(self) -> list[torch.Tensor]:
        raise NotImplementedError

    def take_replaced(self) -> None:
        raise NotImplementedError

    def plan_of(self, tensor: torch.Tensor) -> StepPlan:
        raise NotImplementedError

    def fragments_of(self, tensor: torch.Tensor) -> list[Fragment]:
        raise NotImplementedError

    def _layout_in(self, tensor: torch.Tensor, name: str) -> ParamLayout:
        raise NotImplementedError

    def _shards_are_dtensors(self) -> bool:
        raise NotImplementedError

    def _set_saving(self) -> None:
        self.saving = SavePolicy()  # as a framework's adapter changes it, see attach
        self.was_loaded = False
        self.loaded_record: Record | None = None  # that of the last loaded state; None where it had none

    @property
    def _segment_key(self) -> str | None:
        """The state that has one value per segment of the plan, if the rule keeps one."""
        return None if self.rule.segment_state is None else self.rule.segment_state.name

    @property
    def segment_plans(self) -> bool:
        """Whether the rule keeps a state per segment."""
        return self._segment_key is not None

    @property
    def _form(self) -> str:
        """The form in which a state dict holds second moments."""
        if not self.segment_plans or self.saving.element_form:
            return ELEMENTS
        return UNITS if self._holds_whole_parameters else SEGMENTS

    @property
    def _holds_whole_parameters(self) -> bool:
        """Whether every tensor of the optimizer is a parameter, placed or not, and none a framework's shard."""
        return self.shards is None or self._shards_are_dtensors()

    def contents(self) -> list[list[Contents]]:
        """Per param group, what lies in each of its tensors; a DTensor stands for the whole parameter."""
        return [
            [self._contents(tensor, number) for number, tensor in enumerate(group["params"])]
            for group in self.param_groups
        ]

    def _contents(self, tensor: torch.Tensor, number: int) -> Contents:
        fragments = None if isinstance(tensor, DTensor) else self._fragments.get(tensor)
        if fragments is not None:
            return merged([(plain_name(f.name), f.start, f.numel, f.offset) for f in fragments])
        name = self.block_map.name_of(tensor)
        return ((f"tensor {number} of its group" if name is None else plain_name(name), 0, tensor.numel(), 0),)

    def record(self) -> Record:
        """Where a state saved now comes from; it lies in every param group of a state dict."""
        policy, whole = self.saving, self.saving.recorded_map
        recorded = self.block_map if whole is None else whole
        settings = self.initial_settings
        if policy.unrecorded_settings:
            kept = {key: value for key, value in settings[0].items() if key not in policy.unrecorded_settings}
            settings = [kept]
        return Record(
            type(self).__name__,
            __version__,
            recorded.fingerprint(),
            plain_layouts(recorded),
            settings,
            self.bias_segments,
            self._form,
            policy.row_parts,
            self.contents() if whole is None else None,
        )

    def _note_record(self) -> None:
        """Keeps the record in the param groups themselves: torch's flattened state dicts have the keys of these only."""
        packed = self.record().packed()
        for group in self.param_groups:
            group[KEY] = packed

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a record of its origin. Adam-mini's second moments have a value per output unit of a parameter
        there; in a framework's shards, per segment, or per element (on the CPU) where it saves in formats that know only
        states of the parameters' shape."""
        saved = super().state_dict()
        added: dict[str, Any] = {KEY: self.record().packed()}
        if self.saving.step_in_param_groups:
            added["step"] = max((int(state["step"]) for state in saved["state"].values()), default=0)
        for group in saved["param_groups"]:  # frameworks pick and reorder groups
            group.update(added)
        key = self._segment_key
        if key is not None and not self.saving.external_state and self._form != SEGMENTS:
            tensors = self.all_tensors()
            for index, state in saved["state"].items():
                saved["state"][index] = {**state, key: self._saved_segments(tensors[index], state[key])}
        return saved

    def _saved_segments(self, tensor: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        if self._form == ELEMENTS:
            return expand_segments(state, self.plan_of(tensor)).view_as(tensor)
        return state if isinstance(tensor, DTensor) else self.unit_moments(tensor).placed(state)

    def unit_moments(self, tensor: torch.Tensor) -> UnitMoments:
        """How the second moment of a whole parameter is kept per output unit."""
        return UnitMoments(tensor, self._layout_in(tensor, self.block_map.require_name(tensor)), self.plan_of(tensor))

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state saved by a blockwise optimizer or, where ``accept_mismatch`` says so, by any AdamW.

        States go to the parameters they were saved from by name, in whatever order or numbering they come: also from
        torch.distributed.checkpoint's state dicts. With sharded parameters all ranks must call it at the same time.

        Raises:
            MismatchError: it contradicts this optimizer's settings or model in what ``accept_mismatch`` does not name.
            CheckpointError: it does not fit these tensors, or is of a newer format. Nothing has been loaded then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.take_replaced()
        states, groups, record = prepare_state_dict(self, state_dict)
        self.was_loaded, self.loaded_record = True, record
        if not self.saving.external_state:
            self.state.clear()
        for current, loaded in zip(self.param_groups, groups):
            for key in current.keys() - loaded.keys() - {"params", "param_names", KEY}:
                del current[key]
            current.update(deepcopy(loaded))
        tensors = self.all_tensors()
        for position, loaded in states.items():
            self._take(tensors[position], loaded)
        self._placed.clear()  # the moments lie elsewhere now
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _take(self, tensor: torch.Tensor, loaded: dict[str, Any]) -> None:
        """A tensor's loaded state, in memory of its own."""
        state = self.state[tensor] if self.saving.external_state else {}
        state["step"] = torch.tensor(loaded["step"], dtype=torch.float32)
        if not self.saving.external_state:
            for spec in self.rule.states:
                take = _owned if spec.per == "element" else self._taken_segments
                state[spec.name] = take(tensor, loaded[spec.name])
        self.state[tensor] = state

    def _taken_segments(self, tensor: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _owned(tensor: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
    """This rank's part of a moment as a tensor like the parameter, of its dtype and device, contiguous."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    value = loaded.detach().reshape(part.shape).to(part.device, part.dtype, copy=True).contiguous()
    return like(tensor, value) if isinstance(tensor, DTensor) else value
