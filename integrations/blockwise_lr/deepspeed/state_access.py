"""deepspeed.utils.safe_get_full_optimizer_state and its relatives for our optimizers under ZeRO and BF16_Optimizer.

DeepSpeed cuts states out of tensors of the flat shard's shape. Adam-mini's second moment has another, so the rank
that holds a parameter would fail while the others wait for it in the all-reduce. Here a state is looked up by the parameter's
name: second moments are spread over the elements of the fragments asked for, for the time of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..blocks import BlockError
from ..checkpoint.moments import expand_segments, take_segments
from ..optim import Fragment
from ..optim.base import BlockwiseOptimizer
from ..patches.deepspeed_instances import STATE_ACCESS
from ..patches.upstream_deepspeed import linked_group
from ..plan.step_plan import StepPlan


def serve_optimizer_states(wrapper: Any, optimizer: BlockwiseOptimizer) -> None:
    """Lets DeepSpeed's functions that get and set optimizer states of a parameter work on an optimizer of ours.

    Getting ``exp_avg_sq`` of Adam-mini gives each segment's value at all its elements; setting it takes values that are
    equal over each segment and refuses others. Before the first step states are 0.

    Args:
        wrapper: ``engine.optimizer``: ZeRO of stage 1 to 3, or BF16_Optimizer.
        optimizer: ``engine.basic_optimizer``, with its shards attached.
    """
    states = _States(optimizer)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        _serve_stage3(wrapper, states)
        return
    link = wrapper._link_all_hp_params

    @functools.wraps(link)
    def link_all_hp_params() -> None:  # DeepSpeed does so again after it has moved or loaded its tensors
        link()
        _serve_parameters(wrapper, states)

    STATE_ACCESS.apply(wrapper, _link_all_hp_params=link_all_hp_params)
    _serve_parameters(wrapper, states)


def _serve_parameters(wrapper: Any, states: _States) -> None:
    for group in getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups:
        for parameter in group:
            linked_group(parameter)  # refuses, before any training step, what lacks what is read below
            get, put = parameter.get_full_hp_param, parameter.set_full_hp_param
            STATE_ACCESS.apply(
                parameter,
                get_full_hp_param=functools.partial(_get_full, states, parameter, get),
                set_full_hp_param=functools.partial(_set_full, states, parameter, put),
            )


def _get_full(
    states: _States, parameter: torch.Tensor, upstream: Any, optim_state_key: str | None = None
) -> torch.Tensor:
    if optim_state_key is None:
        return upstream()
    found = states.held(parameter, optim_state_key, 0, parameter.numel())
    dist.all_reduce(found, group=linked_group(parameter))
    return found.view(parameter.shape)


def _set_full(
    states: _States, parameter: torch.Tensor, upstream: Any, value: torch.Tensor, optim_state_key: str | None = None
) -> None:
    if optim_state_key is None:
        upstream(value)
    else:
        states.take(parameter, optim_state_key, value, 0, parameter.numel())


def _serve_stage3(wrapper: Any, states: _States) -> None:
    get_full, set_full = wrapper.get_full_hp_param, wrapper.set_full_hp_param
    get_local, set_local = wrapper.get_local_fp32_param, wrapper.set_local_hp_param

    def get_full_hp_param(param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        if optim_state_key is None or not param.requires_grad:
            return get_full(param, optim_state_key)
        found = states.held(param, optim_state_key, 0, param.ds_numel)
        dist.all_reduce(found, group=param.ds_process_group)
        return found.view(param.ds_shape)

    def set_full_hp_param(value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if optim_state_key is None or not param.requires_grad:
            set_full(value, param, optim_state_key)
        else:
            states.take(param, optim_state_key, value, 0, param.ds_numel)

    def get_local_fp32_param(param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        if optim_state_key is None or not param.requires_grad:
            return get_local(param, optim_state_key)
        return states.held(param, optim_state_key, *_local_range(param))

    def set_local_hp_param(value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if optim_state_key is None or not param.requires_grad:
            set_local(value, param, optim_state_key)
        else:
            states.take(param, optim_state_key, value, *_local_range(param))

    STATE_ACCESS.apply(
        wrapper,
        get_full_hp_param=get_full_hp_param,
        set_full_hp_param=set_full_hp_param,
        get_local_fp32_param=get_local_fp32_param,
        set_local_hp_param=set_local_hp_param,
    )


def _local_range(param: Any) -> tuple[int, int]:
    """First element and size of this rank's partition, whose end may be padding."""
    size = param.partition_numel()
    return dist.get_rank(group=param.ds_process_group) * size, size


class _States:
    """The states of one optimizer, by parameter."""

    def __init__(self, optimizer: BlockwiseOptimizer) -> None:
        self._optimizer = optimizer

    def held(self, parameter: torch.Tensor, key: str, first: int, size: int) -> torch.Tensor:
        """Elements [first, first + size) of a parameter's state, float32; 0 where this rank does not hold them.

        Raises:
            BlockError: there is no such state; on every rank that asks for it.
        """
        self._check(key)
        found = torch.zeros(size, dtype=torch.float32, device=get_accelerator().current_device_name())
        for tensor, fragment in self._fragments(parameter):
            state = self._optimizer.state.get(tensor)
            if not state:
                continue
            begin = fragment.start - first
            found[begin : begin + fragment.numel].copy_(self._read(tensor, fragment, state[key], key))
        return found

    def take(self, parameter: torch.Tensor, key: str, value: torch.Tensor, first: int, size: int) -> None:
        """Writes what this rank holds of elements [first, first + size) of a parameter's state; holds no collective.

        Raises:
            BlockError: no such state, a value of another size, or one that differs within a segment of Adam-mini.
                Nothing has been written then.
        """
        self._check(key)
        name = self._name(parameter)
        if value.numel() != size:
            raise BlockError(f"{key} of {name} was given {value.numel()} elements and has {size}")
        value = value.detach().reshape(-1).float()
        if self._in_segments(key):
            self._check_segments(name, key, value, first)
        for tensor, fragment in self._fragments(parameter):
            begin = fragment.start - first
            self._write(
                tensor, fragment, self._optimizer.init_state(tensor)[key], key, value[begin : begin + fragment.numel]
            )

    def _check_segments(self, name: str, key: str, value: torch.Tensor, first: int) -> None:
        """Padding beyond the parameter's end is not looked at."""
        held = max(0, min(value.numel(), self._optimizer.layout_of(name).numel - first))
        plan = self._plan(Fragment(name, first, held, 0))
        value = value[:held].cpu()
        if not torch.equal(expand_segments(take_segments(value, plan), plan), value):
            raise BlockError(
                f"{key} of {name} was given values that differ within a segment, and {self._optimizer.rule.title} "
                f"keeps one per segment (a head of q and k, a row of other weights, a whole norm); "
                f"give every element of a segment the same value, such as their mean"
            )

    def _check(self, key: str) -> None:
        keys = [spec.name for spec in self._optimizer.rule.states]
        if key not in keys:
            raise BlockError(
                f"{type(self._optimizer).__name__} has no state {key!r} per element; use one of {', '.join(keys)}"
            )

    def _in_segments(self, key: str) -> bool:
        segments = self._optimizer.rule.segment_state
        return segments is not None and segments.name == key

    def _name(self, parameter: torch.Tensor) -> str:
        return self._optimizer.block_map.require_name(parameter)

    def _fragments(self, parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, Fragment]]:
        name = self._name(parameter)
        for tensor, _ in self._optimizer.attached_shards.flats:
            for fragment in self._optimizer.fragments_of(tensor):
                if fragment.name == name:
                    yield tensor, fragment

    def _read(self, tensor: torch.Tensor, fragment: Fragment, state: torch.Tensor, key: str) -> torch.Tensor:
        if not self._in_segments(key):
            return state.narrow(0, fragment.offset, fragment.numel)
        plan, slots = self._slots(tensor, fragment)
        return expand_segments(state[slots.to(state.device)], plan)

    def _write(
        self, tensor: torch.Tensor, fragment: Fragment, state: torch.Tensor, key: str, value: torch.Tensor
    ) -> None:
        if not self._in_segments(key):
            state.narrow(0, fragment.offset, fragment.numel).copy_(value)
            return
        plan, slots = self._slots(tensor, fragment)
        state[slots.to(state.device)] = take_segments(value.cpu(), plan).to(state.device)

    def _slots(self, tensor: torch.Tensor, fragment: Fragment) -> tuple[StepPlan, torch.Tensor]:
        """The plan of a fragment alone, and for each of its slots the slot in the flat tensor's plan."""
        plan = self._plan(Fragment(fragment.name, fragment.start, fragment.numel, 0))
        slots = torch.zeros(plan.slots, dtype=torch.int64)
        there = {
            (run.piece, run.start): run.slot
            for run in self._optimizer.plan_of(tensor).runs
            if run.name == fragment.name
        }
        for run in plan.runs:
            slots[run.slot : run.slot + run.count] = there[run.piece, run.start] + torch.arange(run.count)
        return plan, slots

    def _plan(self, fragment: Fragment) -> StepPlan:
        return self._optimizer._plan(fragment.numel, [fragment], [self._optimizer.layout_of(fragment.name)])
