"""Megatron's checkpoints of our optimizers: second moments of the parameters' shape, and a record that fits every layout.

All of Megatron's formats (torch_dist in its several shardings, and the legacy one) keep states of the parameter's shape
only. Adam-mini's second moment goes through them spread over the elements of its segments, and is taken back from there, so
that it is resharded to any TP, PP and DP as AdamW's is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ..blocks import BlockMap
from ..checkpoint.moments import expand_segments, take_segments
from ..checkpoint.record import same_segments
from ..checkpoint.restore import averaged
from ..checkpoint.target import SavePolicy, SegmentTarget
from ..optim.base import BlockwiseOptimizer
from ..patches.megatron_instances import OPTIMIZER_STATES

# What Megatron's own scheduler compares with the checkpoint, and overrides where its flags say so.
_SCHEDULED = ("lr", "min_lr", "weight_decay")
_WRITTEN = ("exp_avg", "exp_avg_sq")
# DistributedOptimizer's loaders of states, one per sharding; the legacy format's is from_dp_zero.
_LOADERS = (
    "load_parameter_state_from_dp_zero",
    "load_parameter_state_from_dp_reshardable",
    "load_parameter_state_from_fully_reshardable",
    "load_parameter_state_from_fs_model_space",
)


def save_policy(wrapper: Any, recorded: BlockMap, row_sums: bool) -> SavePolicy:
    """How Megatron's wrapper saves and loads an optimizer of ours.

    Args:
        wrapper: Megatron's optimizer (with or without sharding) around ours.
        recorded: the block map to record, the same on all ranks and under any parallelism.
        row_sums: Adam-mini's rows are summed over tensor-parallel ranks.
    """
    return SavePolicy(
        recorded_map=recorded,
        unrecorded_settings=_SCHEDULED,
        row_parts=1 if row_sums else parallel_state.get_tensor_model_parallel_world_size(),
        element_form=True,
        step_in_param_groups=True,
        external_state=isinstance(wrapper, DistributedOptimizer),
        # Megatron gives every rank the same saved settings, so that all raise the same error without asking each other
        collective_load=False,
        mismatch_hint=_flag,
    )


def save_for_any_layout(wrapper: Any, optimizer: BlockwiseOptimizer) -> None:
    """Makes Megatron's wrapper save and load an optimizer of ours, whose shards and policy are attached."""
    if isinstance(wrapper, DistributedOptimizer):
        _Exchange(wrapper, optimizer).install()


def _flag(keys: Sequence[str]) -> str:
    return (
        f"pass --accept-mismatch {' '.join(keys)} (or accept_mismatch={list(keys)!r} to blockwise_lr.megatron.register)"
    )


class _Exchange:
    """What one DistributedOptimizer saves of its parameters' states, and how it takes them back.

    Giving Adam-mini's second moments takes 4 bytes of the CPU's memory per element of this rank's shards until the save is
    over. Holds the wrapper weakly: the wrapper holds this.
    """

    def __init__(self, wrapper: DistributedOptimizer, optimizer: BlockwiseOptimizer) -> None:
        self._wrapper, self.optimizer = weakref.ref(wrapper), optimizer
        self.segments_known = False  # the states being loaded were saved by the same segments
        self.to_average: dict[int, torch.Tensor] = {}

    @property
    def wrapper(self) -> DistributedOptimizer:
        """Megatron's optimizer, which is there as long as its methods are called."""
        wrapper = self._wrapper()
        if wrapper is None:
            raise RuntimeError("Megatron's optimizer is gone, and a method of it was called")
        return wrapper

    def install(self) -> None:
        """Replaces the two methods through which all of Megatron's formats go, on this instance."""
        wrapper = self.wrapper
        OPTIMIZER_STATES.apply(
            wrapper,
            _get_main_param_and_optimizer_states=self.give,
            _set_main_param_and_optimizer_states=self.take,
            **{name: self._averaging(getattr(type(wrapper), name)) for name in _LOADERS},
        )

    def give(self, model_param: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fp32 shard of a parameter, and its states in the shard's shape. Steps go with the param groups."""
        main = self._main(model_param)
        state, given = self.optimizer.state[main], {"param": main}
        for spec in self.optimizer.rule.states:
            value = state[spec.name]
            if spec.per == "segment":
                value = expand_segments(value, self.optimizer.plan_of(main)).view_as(main)
            given[spec.name] = value
        for key in _WRITTEN:  # Megatron writes both of Adam's moments, whatever the optimizer keeps
            if key not in given:
                given[key] = torch.zeros_like(main)
        return given

    @torch.no_grad()
    def take(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        """The reverse; segment states that were not saved by the same segments wait until all are there."""
        main = self._main(model_param)
        state = self.optimizer.state[main]
        main.copy_(tensors["param"])
        for spec in self.optimizer.rule.states:
            value = tensors[spec.name]
            if spec.per == "element":
                state[spec.name].copy_(value)
            elif self.segments_known:
                state[spec.name].copy_(take_segments(value.reshape(-1).float(), self.optimizer.plan_of(main)))
            else:
                self.to_average[id(main)] = value.reshape(-1).float().clone()

    def _main(self, model_param: torch.Tensor) -> torch.Tensor:
        group, order = self.wrapper.model_param_group_index_map[model_param]
        return self.optimizer.param_groups[group]["params"][order]

    def _averaging(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """One of Megatron's loaders, and then the means over the segments, to which all ranks that share one add."""

        @functools.wraps(load)
        def loading(*arguments: Any, **options: Any) -> None:
            self.to_average.clear()
            self.segments_known = same_segments(self.optimizer.loaded_record, self.optimizer.record())
            load(self.wrapper, *arguments, **options)
            spec = self.optimizer.rule.segment_state
            if spec is not None and not self.segments_known:
                tensors = self.optimizer.all_tensors()
                elements = {number: self.to_average[id(tensor)] for number, tensor in enumerate(tensors)}
                for number, means in averaged(cast(SegmentTarget, self.optimizer), tensors, elements).items():
                    self.optimizer.state[tensors[number]][spec.name].copy_(means)
                self.to_average.clear()

        return loading
