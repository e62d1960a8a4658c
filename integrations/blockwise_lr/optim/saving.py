"""State dicts of the blockwise optimizers: what they hold, what they say of their origin, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .._version import __version__
from ..blocks.block_map import plain_name
from ..checkpoint.matching import Contents, merged
from ..checkpoint.moments import expand_segments
from ..checkpoint.record import ELEMENTS, KEY, SEGMENTS, UNITS, Record, in_parameters, plain_layouts
from ..checkpoint.restore import prepare_state_dict
from ..checkpoint.units import UnitMoments
from ..plan.dtensor import like


class Saving:
    """Mixed into :class:`~blockwise_lr.optim.base.BlockwiseOptimizer`."""

    RECORD_KEY = KEY

    def _set_saving(self) -> None:
        """How states are saved and loaded, as frameworks' adapters change it."""
        self.recorded_map = self.block_map  # what the record shows; of the whole model where this rank has a part
        self.row_parts = 1  # in how many segments rows that tensor-parallel ranks hold parts of are cut
        self.was_loaded = False
        self.loaded_record: Record | None = None  # that of the last loaded state; None where it had none
        self.element_state = False  # saved second moments are spread over elements
        self.step_in_groups = False  # param groups are saved with the step count too
        self.states_apart = (
            False  # the framework saves and loads the states' tensors itself; only steps come with groups
        )
        self.loads_together = False  # all ranks load at the same time, and hear of each other's errors
        self.to_accept: Callable[[Sequence[str]], str] = in_parameters  # how a user accepts differences of such names

    @property
    def segment_plans(self) -> bool:
        """Whether exp_avg_sq has one value per segment of the plan, and not one per element."""
        return False

    @property
    def _form(self) -> str:
        """The form in which a state dict holds second moments."""
        if not self.segment_plans or self.element_state:
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
        tensors = self.contents() if self.recorded_map is self.block_map else None
        return Record(
            type(self).__name__,
            __version__,
            self.recorded_map.fingerprint(),
            plain_layouts(self.recorded_map),
            self.initial_settings,
            self.bias_segments,
            self._form,
            self.row_parts,
            tensors,
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
        if self.step_in_groups:
            added["step"] = max((int(state["step"]) for state in saved["state"].values()), default=0)
        for group in saved["param_groups"]:  # frameworks pick and reorder groups
            group.update(added)
        if self.segment_plans and not self.states_apart and self._form != SEGMENTS:
            tensors = self.all_tensors()
            for index, state in saved["state"].items():
                saved["state"][index] = {**state, "exp_avg_sq": self._saved_second(tensors[index], state["exp_avg_sq"])}
        return saved

    def _saved_second(self, tensor: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if self._form == ELEMENTS:
            return expand_segments(second, self.plan_of(tensor)).view_as(tensor)
        return second if isinstance(tensor, DTensor) else self.unit_moments(tensor).placed(second)

    def unit_moments(self, tensor: torch.Tensor) -> UnitMoments:
        """How the second moment of a whole parameter is kept per output unit."""
        return UnitMoments(tensor, self._layout_in(tensor, self.block_map.name_of(tensor)), self.plan_of(tensor))

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
        states, groups, record = prepare_state_dict(self, state_dict)
        self.was_loaded, self.loaded_record = True, record
        if not self.states_apart:
            self.state.clear()
        for current, loaded in zip(self.param_groups, groups):
            for key in current.keys() - loaded.keys() - {"params", "param_names", KEY}:
                del current[key]
            current.update(deepcopy(loaded))
        tensors = self.all_tensors()
        for position, loaded in states.items():
            self._take(tensors[position], loaded)
        self._placed.clear()  # the moments lie elsewhere now
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _take(self, tensor: torch.Tensor, loaded: dict[str, Any]) -> None:
        """A tensor's loaded state, in memory of its own."""
        state = self.state[tensor] if self.states_apart else {}
        state["step"] = torch.tensor(loaded["step"], dtype=torch.float32)
        if not self.states_apart:
            state["exp_avg"] = _owned(tensor, loaded["exp_avg"])
            state["exp_avg_sq"] = self._taken_second(tensor, loaded["exp_avg_sq"])
        self.state[tensor] = state

    def _taken_second(self, tensor: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
        return _owned(tensor, loaded)


def _owned(tensor: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
    """This rank's part of a moment as a tensor like the parameter, of its dtype and device, contiguous."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    value = loaded.detach().reshape(part.shape).to(part.device, part.dtype, copy=True).contiguous()
    return like(tensor, value) if isinstance(tensor, DTensor) else value
