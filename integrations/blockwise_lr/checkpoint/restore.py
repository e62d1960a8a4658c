"""Loading a saved optimizer state: checked against the optimizer, and its second moments brought into the form it needs."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ..optim.plan import StepPlan, adam_mini_plan, element_biases
from .errors import CheckpointError, is_first_rank, raise_together
from .moments import gather, means, segment_sums, spread
from .record import ELEMENTS, GROUP_SETTINGS, KEY, SEGMENTS, Difference, Record, differences, plain, same_segments, settle

if TYPE_CHECKING:
    from ..optim.base import BlockwiseOptimizer

log = logging.getLogger("blockwise_lr")
MOMENTS = ("exp_avg", "exp_avg_sq")


def prepared(optimizer: BlockwiseOptimizer, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Record | None]:
    """A state dict that torch's load_state_dict can load as it is: this optimizer's settings, groups and states; and the
    record of the given one's origin.

    Every rank that holds shards must call it at the same time. Changes neither the optimizer nor the given dict.

    Args:
        optimizer: the one that is to load it.
        state_dict: of a blockwise optimizer, or of any AdamW (torch's, DeepSpeed's).

    Raises:
        MismatchError: it contradicts the optimizer and ``accept_mismatch`` does not name that.
        CheckpointError: shapes that do not fit, a state without moments, a newer format.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    error, record, states = None, None, {}
    try:
        record = _record_of(groups)
        check(optimizer, record)
        if optimizer.states_apart:
            states = _steps(optimizer, groups)
        else:
            states = _indexed_states(optimizer, state_dict["state"], groups)
            _check_shapes(optimizer, states, record)
    except CheckpointError as problem:
        error = problem
    if optimizer.loads_together:
        raise_together(error)
    elif error is not None:
        raise error
    step = max((int(state["step"]) for state in states.values()), default=0)
    _tell(optimizer, record)
    ready = {"state": _counted(states if optimizer.states_apart else _converted(optimizer, states, record)),
             "param_groups": [_merged_group(optimizer, number, group, record, step)
                              for number, group in enumerate(groups)]}
    return ready, record


def _record_of(groups: list[dict[str, Any]]) -> Record | None:
    """The record in a saved state's param groups; None where another optimizer saved it."""
    saved = [group[KEY] for group in groups if KEY in group]
    return Record.from_dict(saved[0]) if saved else None


def check(optimizer: BlockwiseOptimizer, record: Record | None, origin: str = "the saved optimizer state") -> None:
    """Raises MismatchError where a record contradicts an optimizer; see :func:`~.record.settle`."""
    if record is None:
        found = [Difference("optimizer", f"optimizer: one without a blockwise_lr record, taken for AdamW -> "
                                         f"{type(optimizer).__name__}")]
    else:
        found = differences(record, optimizer.record())
    settle(found, optimizer.accept_mismatch, origin, optimizer.to_accept)


def _steps(optimizer: BlockwiseOptimizer, groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The step count of every tensor by its position, where that is all of a state that the groups come with."""
    steps = [group["step"] for group in groups for _ in group["params"] if group.get("step") is not None]
    if len(steps) != len(optimizer.all_tensors()):
        raise CheckpointError("the saved param groups have no step count; load the weights alone, or a checkpoint whose "
                              "optimizer states were saved too")
    return {position: {"step": float(step)} for position, step in enumerate(steps)}


def _counted(states: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The states, each with a step tensor of its own."""
    return {position: {**state, "step": torch.tensor(state["step"], dtype=torch.float32)}
            for position, state in states.items()}


def _indexed_states(optimizer: BlockwiseOptimizer, saved: Mapping[Any, Any],
                    groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The saved states by position among the optimizer's tensors; step is a number, all else is left out."""
    tensors = optimizer.all_tensors()
    indices = list(chain.from_iterable(group["params"] for group in groups))
    sizes, saved_sizes = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in groups]
    if sizes != saved_sizes:
        raise CheckpointError(f"the saved optimizer state has param groups of {saved_sizes} tensors and this optimizer "
                              f"of {sizes}; start with the model, ZeRO stage and param groups it was saved from, or go "
                              f"through a universal checkpoint")
    group_steps = list(chain.from_iterable([group.get("step")] * len(group["params"]) for group in groups))
    states = {}
    for position, (index, _) in enumerate(zip(indices, tensors)):
        state = saved.get(index)
        if not state:
            continue
        step = state.get("step", group_steps[position])
        if step is None or any(not isinstance(state.get(key), torch.Tensor) for key in MOMENTS):
            raise CheckpointError(f"the saved optimizer state has {sorted(map(str, state))} where step, exp_avg and "
                                  f"exp_avg_sq are needed; only AdamW and Adam-mini states can be loaded")
        states[position] = {"step": float(step), **{key: state[key] for key in MOMENTS}}
    return states


def _check_shapes(optimizer: BlockwiseOptimizer, states: Mapping[int, Mapping[str, Any]], record: Record | None) -> None:
    tensors = optimizer.all_tensors()
    for position, state in states.items():
        tensor, numel = tensors[position], tensors[position].numel()
        wanted = _source_plan(optimizer, tensor, record).slots if _form(record) == SEGMENTS else numel
        for key, expected in zip(MOMENTS, (numel, wanted)):
            if state[key].numel() != expected:
                raise CheckpointError(
                    f"the saved {key} of tensor {position} has {state[key].numel()} values where {expected} are needed: "
                    f"it was saved on another number of ranks, another ZeRO stage or another model; convert the "
                    f"checkpoint to a universal one and load that")


def _form(record: Record | None) -> str:
    return ELEMENTS if record is None else record.second_moment


def _source_plan(optimizer: BlockwiseOptimizer, tensor: torch.Tensor, record: Record) -> StepPlan:
    """The plan the saved segments followed: the saved layouts over what this optimizer's tensor holds."""
    fragments = optimizer.fragments_of(tensor)
    layouts = [record.layout(fragment.name) for fragment in fragments]
    if record.bias_segments == "element":
        layouts = [element_biases(layout) for layout in layouts]
    return adam_mini_plan(tensor.numel(), fragments, layouts)


# ---- second moments


def _converted(optimizer: BlockwiseOptimizer, states: Mapping[int, dict[str, Any]],
               record: Record | None) -> dict[int, dict[str, Any]]:
    """States with exp_avg_sq in the optimizer's own form."""
    tensors = optimizer.all_tensors()
    form, to_segments = _form(record), optimizer.segment_plans
    known = same_segments(record, optimizer.record())
    if form == SEGMENTS and not (to_segments and known):
        for position, state in states.items():
            plan = _source_plan(optimizer, tensors[position], record)
            state["exp_avg_sq"] = spread(state["exp_avg_sq"], plan).view_as(tensors[position])
        form = ELEMENTS
    if to_segments and form == ELEMENTS:
        moments = {position: state["exp_avg_sq"].float().reshape(-1) for position, state in states.items()}
        if known:
            found = {position: gather(elements, optimizer.plan_of(tensors[position]))
                     for position, elements in moments.items()}
        else:
            found = averaged(optimizer, tensors, moments)
        for position, value in found.items():
            states[position]["exp_avg_sq"] = value
    return dict(states)


def averaged(optimizer: Any, tensors: list[torch.Tensor],
             moments: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Means over segments; those that shard edges cut are summed over the ranks that share them, so all must call it.

    Args:
        optimizer: a BlockwiseAdamMini.
        tensors: its flat tensors.
        moments: position among the tensors -> (numel,), the second moments of its elements.

    Returns:
        Position -> (slots,), float32.
    """
    sums = {position: segment_sums(elements, optimizer.plan_of(tensors[position]))
            for position, elements in moments.items()}
    reduced = optimizer.reduce_cut({id(tensors[position]): value.float().to(tensors[position].device)
                                    for position, value in sums.items()})
    found = {}
    for position, value in sums.items():
        plan = optimizer.plan_of(tensors[position])
        whole, cut = means(value, plan, plan.whole), plan.cut
        if len(cut):
            whole += means(reduced[id(tensors[position])].to(value.device), plan, cut)
        found[position] = whole
    return found


def _tell(optimizer: BlockwiseOptimizer, record: Record | None) -> None:
    before, now = ("AdamW" if record is None else record.optimizer), type(optimizer).__name__
    if before == now or not is_first_rank():
        return
    done = {(False, True): "second moments are averaged over each of Adam-mini's segments",
            (True, False): "every element gets its segment's second moment"}.get(
                (before == "BlockwiseAdamMini", bool(optimizer.segment_plans)), "both moments are kept as they are")
    log.warning("a state saved by %s continues in %s: first moments and step counts are kept, %s", before, now, done)


# ---- param groups


def _merged_group(optimizer: BlockwiseOptimizer, number: int, saved: dict[str, Any], record: Record | None,
                  step: int) -> dict[str, Any]:
    """The saved group with this optimizer's settings where they were accepted to differ."""
    current = optimizer.param_groups[number]
    if record is None:
        merged = {**{key: value for key, value in current.items() if key != "params"}, "params": saved["params"]}
    else:
        merged = {key: value for key, value in saved.items() if key not in (KEY, "step")}
        old = record.settings_of(number)
        new = optimizer.initial_settings[min(number, len(optimizer.initial_settings) - 1)]
        for key in GROUP_SETTINGS:
            if key in optimizer.accept_mismatch and plain(old.get(key)) != plain(new.get(key)):
                merged[key] = current[key]
        if merged["block_weight_decay"] != saved["block_weight_decay"]:
            merged["group_decay"] = current["group_decay"]
    before = record.settings_of(number)["block_lr_ratios"] if record is not None else None
    ratios = dict(current["block_lr_ratios"])
    if before != merged["block_lr_ratios"] == ratios and optimizer.ratio_fade_steps:
        merged["ratio_fade"] = {"from": before or dict.fromkeys(ratios, 1.0), "start": step, "at": step,
                                "steps": optimizer.ratio_fade_steps}
        if is_first_rank() and number == 0:
            log.warning("learning-rate ratios fade from the checkpoint's to this run's over %d optimizer steps",
                        optimizer.ratio_fade_steps)
    return merged
