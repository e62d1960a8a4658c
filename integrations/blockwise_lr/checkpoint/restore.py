"""Loading a saved optimizer state: checked against the optimizer, and its second moments brought into the form it needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from ..collective.errors import is_rank_zero
from ..plan.step_plan import StepPlan, segment_plan
from ..rules.param_groups import STATED, STATED_AT
from .errors import CheckpointError, raise_on_all_ranks
from .matching import positions
from .moments import expand_segments, segment_means, segment_sums, take_segments
from .record import (
    ELEMENTS,
    KEY,
    SEGMENTS,
    UNITS,
    Difference,
    Record,
    differences,
    plain,
    reject_mismatches,
    same_segments,
)
from .target import RestoreTarget, SegmentTarget
from .units import local_part, units_to_elements

log = logging.getLogger("blockwise_lr")
State = dict[str, Any]


def prepare_state_dict(
    optimizer: RestoreTarget, state_dict: Mapping[str, Any]
) -> tuple[dict[int, State], list[dict[str, Any]], Record | None]:
    """What a state dict holds for an optimizer: its tensors' states, by position; its param groups, without tensors; and
    the record of the state's origin.

    Every rank that holds shards must call it at the same time. Changes neither the optimizer nor the given dict.

    Args:
        optimizer: the one that is to load it.
        state_dict: of a blockwise optimizer, or of any AdamW (torch's, DeepSpeed's). Its params may be numbers or names.

    Returns:
        States of this rank's parts: step, exp_avg (elements of the tensor) and exp_avg_sq in the optimizer's own form;
        of the steps alone where the framework keeps the rest.

    Raises:
        MismatchError: it contradicts the optimizer and ``accept_mismatch`` does not name that.
        CheckpointError: shapes or an order that do not fit, a state without moments, a newer format.
    """
    error, record, states = None, None, {}
    groups: list[dict[str, Any]] = []
    try:
        groups = [dict(group) for group in state_dict["param_groups"]]
        record = Record.of_groups(groups)
        check_record(optimizer, record)
        if optimizer.saving.external_state:
            states = _steps(optimizer, groups)
        else:
            states = _states(optimizer, state_dict["state"], groups, record)
    except CheckpointError as problem:
        error = problem
    except (KeyError, TypeError, AttributeError) as problem:
        error = CheckpointError(
            f"this is no state dict of an optimizer ({type(problem).__name__}: {problem}); give what "
            f"optimizer.state_dict() returned"
        )
    if optimizer.saving.collective_load:
        raise_on_all_ranks(error)
    elif error is not None:
        raise error
    step = max((int(state["step"]) for state in states.values()), default=0)
    _tell(optimizer, record)
    now = optimizer.record()
    merged = [_merged_group(optimizer, number, group, record, now, step) for number, group in enumerate(groups)]
    return states if optimizer.saving.external_state else _converted(optimizer, states, record, now), merged, record


def check_record(optimizer: RestoreTarget, record: Record | None, origin: str = "the saved optimizer state") -> None:
    """Raises MismatchError where a record contradicts an optimizer (see :func:`~.record.reject_mismatches`), CheckpointError
    where what it saved is none of the states that the optimizer needs."""
    if record is None:
        found = [
            Difference(
                "optimizer",
                f"optimizer: one without a blockwise_lr record, taken for AdamW -> {type(optimizer).__name__}",
            )
        ]
    else:
        found = differences(record, optimizer.record())
    reject_mismatches(found, optimizer.accept_mismatch, origin, optimizer.saving.mismatch_hint)
    before, unkept = (
        None if record is None else record.rule,
        [spec.name for spec in optimizer.rule.states if spec.name != "exp_avg"],
    )
    if before is not None and before.whole_matrices and not optimizer.rule.whole_matrices and unkept:
        raise CheckpointError(
            f"{origin} is {before.class_name}'s, which keeps no {unkept[0]} of hidden matrices (there are zeros), and "
            f"{optimizer.rule.class_name} would divide by it; load the weights alone"
        )


def _steps(optimizer: RestoreTarget, groups: list[dict[str, Any]]) -> dict[int, State]:
    """The step count of every tensor by its position, where that is all of a state that the groups come with."""
    steps = [group["step"] for group in groups for _ in group["params"] if group.get("step") is not None]
    if len(steps) != len(optimizer.all_tensors()):
        raise CheckpointError(
            "the saved param groups have no step count; load the weights alone, or a checkpoint whose "
            "optimizer states were saved too"
        )
    return {position: {"step": float(step)} for position, step in enumerate(steps)}


def _states(
    optimizer: RestoreTarget, saved: Mapping[Any, Any], groups: list[dict[str, Any]], record: Record | None
) -> dict[int, State]:
    """This rank's parts of the saved states by position among the optimizer's tensors; all else is left out."""
    tensors, own = optimizer.all_tensors(), optimizer.contents()
    found = positions(groups, own, None if record is None else record.tensors)
    group_steps = {index: group.get("step") for group in groups for index in group["params"]}
    contents = list(chain.from_iterable(own))
    stray = [index for index in saved if index not in found]
    if stray and is_rank_zero():
        log.warning("the saved optimizer state has entries of no param group (%s), which are left out", stray[0])
    states = {}
    for index, position in found.items():
        state = saved.get(index)
        if not state:
            continue
        name = ", ".join(dict.fromkeys(fragment[0] for fragment in contents[position][:2])) or "an empty shard"
        step = state.get("step", group_steps[index])
        missing = [spec.name for spec in optimizer.rule.states if not isinstance(state.get(spec.name), torch.Tensor)]
        if step is None or missing:
            *others, last = (spec.name for spec in optimizer.rule.states)
            needed = f"{', '.join(['step', *others])} and {last}"
            raise CheckpointError(
                f"the saved optimizer state of {name} has {sorted(map(str, state))} where {needed} are needed; only states of "
                f"optimizers that keep these can be loaded by {optimizer.rule.class_name}, so load the weights alone"
            )
        states[position] = {"step": float(step), **_parts(optimizer, tensors[position], state, record, name)}
    return states


def _parts(
    optimizer: RestoreTarget, tensor: torch.Tensor, state: Mapping[str, Any], record: Record | None, name: str
) -> dict[str, torch.Tensor]:
    """This rank's parts of a tensor's saved states: per element, or per segment of the saved layouts."""
    numel, parts = optimizer.plan_of(tensor).numel, {}
    for spec in optimizer.rule.states:
        key, value, expected = spec.name, state[spec.name], numel
        form = _saved_form(record, key)
        if form == ELEMENTS or record is None:
            value = local_part(tensor, value)
        elif form == UNITS:
            value = units_to_elements(tensor, record.layout(optimizer.block_map.require_name(tensor)), value)
        else:
            expected = _source_plan(optimizer, tensor, record).slots
        size = value.numel() * (2 if value.is_complex() else 1)
        as_parameter = value.dim() < 2 or tuple(value.shape) in (
            tuple(local_part(tensor, tensor).shape),
            tuple(tensor.shape),
        )
        if size != expected or not as_parameter:
            raise CheckpointError(
                f"the saved {key} of {name} is of shape {tuple(value.shape)} where {expected} values are needed: it was "
                f"saved on another number of ranks, another ZeRO stage or another model; convert the checkpoint to a "
                f"universal one and load that"
            )
        parts[key] = value
    return parts


def _saved_form(record: Record | None, key: str) -> str:
    """The form a state was saved in: that of segment states, where it was one of the saving optimizer's."""
    rule = None if record is None else record.rule
    if record is None or rule is None or rule.segment_state is None or rule.segment_state.name != key:
        return ELEMENTS
    return record.second_moment


def _source_plan(optimizer: RestoreTarget, tensor: torch.Tensor, record: Record) -> StepPlan:
    """The plan the saved segments followed: the saved layouts over what this optimizer's tensor holds."""
    fragments = optimizer.fragments_of(tensor)
    layouts = [record.layout(fragment.name) for fragment in fragments]
    if record.rule is not None:
        layouts = [record.rule.segments(layout, record.bias_segments) for layout in layouts]
    return segment_plan(optimizer.plan_of(tensor).numel, fragments, layouts)


# ---- segment states


def _converted(
    optimizer: RestoreTarget, states: dict[int, State], record: Record | None, now: Record
) -> dict[int, State]:
    """States in the optimizer's own form: per element, or per segment of its plan."""
    tensors, own = optimizer.all_tensors(), optimizer.rule.segment_state
    known = same_segments(record, now)
    for key in [spec.name for spec in optimizer.rule.states]:
        in_segments = _saved_form(record, key) == SEGMENTS
        wanted_in_segments = own is not None and own.name == key
        if in_segments and wanted_in_segments and known:
            continue
        if in_segments and record is not None:
            for position, state in states.items():
                state[key] = expand_segments(state[key], _source_plan(optimizer, tensors[position], record))
        if wanted_in_segments:
            _take_means(optimizer, tensors, states, key, known)
    return states


def _take_means(optimizer: Any, tensors: list[torch.Tensor], states: dict[int, State], key: str, known: bool) -> None:
    """A state per element becomes one per segment: any of its elements where they are equal, or else their mean."""
    moments = {position: state[key].float().reshape(-1) for position, state in states.items()}
    if known:
        found = {
            position: take_segments(elements, optimizer.plan_of(tensors[position]))
            for position, elements in moments.items()
        }
    else:
        found = averaged(optimizer, tensors, moments)
    for position, value in found.items():
        states[position][key] = value


def averaged(
    optimizer: SegmentTarget, tensors: list[torch.Tensor], moments: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Means over segments; those that shard edges cut are summed over the ranks that share them, so all must call it.

    Args:
        optimizer: one whose rule keeps a state per segment.
        tensors: its flat tensors.
        moments: position among the tensors -> (numel,), the second moments of its elements.

    Returns:
        Position -> (slots,), float32.
    """
    sums = {
        position: segment_sums(elements, optimizer.plan_of(tensors[position])) for position, elements in moments.items()
    }
    reduced = optimizer.all_reduce_shared(
        {id(tensors[position]): value.float().to(tensors[position].device) for position, value in sums.items()}
    )
    found = {}
    for position, value in sums.items():
        plan = optimizer.plan_of(tensors[position])
        whole, cut = segment_means(value, plan, plan.local), plan.shared
        if len(cut):
            whole += segment_means(reduced[id(tensors[position])].to(value.device), plan, cut)
        found[position] = whole
    return found


def _tell(optimizer: RestoreTarget, record: Record | None) -> None:
    before, now = ("AdamW" if record is None else record.optimizer), type(optimizer).__name__
    if before == now or not is_rank_zero():
        return
    kept = [spec.name for spec in optimizer.rule.states if spec.per == "element"]
    done = f"step counts and {' and '.join(kept)} are kept"
    own, saved = (
        optimizer.rule.segment_state,
        None if record is None or record.rule is None else record.rule.segment_state,
    )
    if own is not None and (saved is None or saved.name != own.name):
        done += f", {own.name} is averaged over each segment"
    if saved is not None and own is None and saved.name in kept:
        done += f", every element getting its segment's {saved.name}"
    log.warning("a state saved by %s continues in %s: %s", before, now, done)


# ---- param groups

# keys of a saved group that belong to its tensors and not to its settings
_NOT_SETTINGS = ("params", "param_names", KEY, "step")
# block rates that the saving run's schedule stated: this run's schedule says its own, and where it has none that knows
# blocks, ratios hold (lr_floor: before version 0.2)
_OF_THE_RUN = (STATED, STATED_AT, "lr_floor")


def _merged_group(
    optimizer: RestoreTarget,
    number: int,
    saved: Mapping[str, Any],
    record: Record | None,
    now: Record,
    step: int,
) -> dict[str, Any]:
    """The saved group with this optimizer's settings where they were accepted to differ, without tensors."""
    current = {key: value for key, value in optimizer.param_groups[number].items() if key not in _NOT_SETTINGS}
    if record is None:
        merged = dict(current)
    else:
        old = record.settings_of(number)
        # torch's full state dicts leave out empty dicts, and make lists of tuples
        saved = {"block_weight_decay": old["block_weight_decay"], **saved}
        saved = {key: tuple(value) if key == "betas" else value for key, value in saved.items()}
        if record.optimizer != type(optimizer).__name__:  # what only the other rule has
            saved = {key: value for key, value in saved.items() if key in current or key not in old}
        merged = {
            **current,
            **{key: value for key, value in saved.items() if key not in (*_NOT_SETTINGS, *_OF_THE_RUN)},
        }
        new = now.settings_of(number)
        for key in new:
            if key in optimizer.accept_mismatch and plain(old.get(key)) != plain(new.get(key)):
                _take_current(merged, current, key)
        if plain(merged["block_weight_decay"]) != plain(saved["block_weight_decay"]):
            merged["group_decay"] = current["group_decay"]
    before = record.settings_of(number)["block_lr_ratios"] if record is not None else None
    ratios = dict(current["block_lr_ratios"])
    if before != merged["block_lr_ratios"] == ratios and optimizer.ratio_fade_steps:
        merged["ratio_fade"] = {
            "from": before or dict.fromkeys(ratios, 1.0),
            "start": step,
            "at": step,
            "steps": optimizer.ratio_fade_steps,
        }
        if is_rank_zero() and number == 0:
            log.warning(
                "learning-rate ratios fade from the checkpoint's to this run's over %d optimizer steps",
                optimizer.ratio_fade_steps,
            )
    return merged


def _take_current(merged: dict[str, Any], current: Mapping[str, Any], key: str) -> None:
    """This run's value of a setting, and of what follows from it."""
    follows = {"lr": ("lr", "initial_lr", "max_lr"), "min_lr": ("block_min_lr",)}.get(key, (key,))
    for name in follows:
        if name in current:
            merged[name] = current[name]
        else:
            merged.pop(name, None)
