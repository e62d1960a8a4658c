"""Universal checkpoints, loaded: saved at one number of ranks and ZeRO stage, taken at any other.

Folders that DeepSpeed's converter made alone (without :mod:`~blockwise_lr.deepspeed.universal`) load as well.

DeepSpeed's loaders take a stage's own universal folders only and give every param group the first one's settings, so
engines with a blockwise optimizer load through this module: every file holds a whole parameter's state, and a rank
takes from it what its shards hold.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.errors import CheckpointError, run_on_all_ranks
from ..checkpoint.record import Record, by_names
from ..checkpoint.restore import check_record
from ..optim.base import BlockwiseOptimizer
from ..patches.upstream_deepspeed import ZERO3, copy_to_low_precision, is_a
from .reading import read

_SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")


class UniversalFolder:
    """The ``zero`` folder of a universal checkpoint."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) / "zero"
        path = self.folder / "optimizer_state.pt"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is not a universal checkpoint ({path} is missing); convert one with "
                f"python -m blockwise_lr.deepspeed.universal CHECKPOINT OUTPUT"
            )
        self.common = _load(path)
        if not isinstance(self.common, dict) or not isinstance(self.common.get("param_groups"), list):
            raise CheckpointError(f"{path} holds no param groups; convert the checkpoint again")

    def param_groups(self) -> list[dict[str, Any]]:
        return by_names(self.common["param_groups"])

    def record(self) -> Record | None:
        """The origin of the state; None where another optimizer saved it."""
        return Record.of_groups(self.common["param_groups"])

    def step(self, name: str) -> float | None:
        """Optimizer steps of a parameter: in a file of its own (ZeRO-1 and 2), or common to all (ZeRO-3)."""
        path = self.folder / name / "step.pt"
        if path.is_file():
            return float(_load(path))
        states = self.common.get("optimizer_state_dict", {}).get("state", {})
        return float(states[0]["step"]) if states and "step" in states[0] else None

    def has_states(self, name: str, states: Sequence[str]) -> bool:
        """Whether the parameter was ever stepped (DeepSpeed writes no states for one that was not).

        Args:
            name: the parameter's.
            states: what the loading optimizer keeps.

        Raises:
            CheckpointError: its weights, or some of the states, are missing.
        """
        missing = [key for key in ("fp32", *states) if not (self.folder / name / f"{key}.pt").is_file()]
        if missing and missing != list(states):
            raise CheckpointError(
                f"the universal checkpoint {self.folder.parent} lacks {', '.join(missing)} of "
                f"{name}; it is incomplete or of another model"
            )
        return not missing

    def values(self, name: str, key: str, numel: int) -> torch.Tensor:
        """A parameter's fp32 weights or one moment, whole and flat.

        Raises:
            CheckpointError: the file cannot be read, or holds another number of elements.
        """
        saved = _load(self.folder / name / f"{key}.pt")
        saved = saved["param"] if isinstance(saved, dict) else saved
        if saved.numel() != numel:
            raise CheckpointError(
                f"{self.folder / name}/{key}.pt holds {saved.numel()} values and the parameter has "
                f"{numel}; the checkpoint is of another model"
            )
        return saved.reshape(-1)


def _state_names(optimizer: BlockwiseOptimizer) -> list[str]:
    return [spec.name for spec in optimizer.rule.states]


def _load(path: Path) -> Any:
    try:
        return read(path, mapped=True)
    except (CheckpointError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); convert the checkpoint again") from error


def check_universal(optimizer: BlockwiseOptimizer, folder: str) -> None:
    """Looks into all files that a rank's shards need; reads no values.

    Raises:
        CheckpointError: files are missing, damaged or of another model.
        MismatchError: the origin of the state contradicts the run in what ``accept_mismatch`` does not name.
    """
    source = UniversalFolder(folder)
    check_record(optimizer, source.record(), f"checkpoint {folder}")
    states = _state_names(optimizer)
    for name in {fragment.name for _, fragments in optimizer.attached_shards.flats for fragment in fragments}:
        for key in ("fp32", *states) if source.has_states(name, states) else ("fp32",):
            source.values(name, key, optimizer.block_map[name].numel)


def _read(optimizer: BlockwiseOptimizer, folder: str) -> tuple[UniversalFolder, dict[int, dict[str, Any]]]:
    """The folder, and this rank's states by id of the flat tensor."""
    source = UniversalFolder(folder)
    flats = optimizer.attached_shards.flats
    return source, {id(flat): _moments(source, optimizer, flat, fragments) for flat, fragments in flats}


def load_universal(wrapper: Any, optimizer: BlockwiseOptimizer, folder: str) -> None:
    """Loads weights, optimizer state and loss scaler of a universal checkpoint into DeepSpeed's wrapper.

    All ranks call it together. Reads one parameter's state at a time.

    Raises:
        CheckpointError: files are missing, damaged or of another model. Nothing has been loaded then.
        MismatchError: as :meth:`BlockwiseOptimizer.load_state_dict`.
    """
    is_stage3 = is_a(wrapper, ZERO3)
    source, states = run_on_all_ranks(lambda: _read(optimizer, folder))
    if is_stage3:
        wrapper._set_fp32_optimizer_param_groups()
    try:
        optimizer.load_state_dict(_state_dict(source, optimizer, states))
    finally:
        if is_stage3:
            wrapper._clear_fp32_optimizer_param_groups()
    load_weights(wrapper, optimizer, source)
    if hasattr(wrapper, "loss_scaler") and wrapper.dynamic_loss_scale == source.common.get("dynamic_loss_scale"):
        for key in _SCALER:
            setattr(wrapper, key, source.common[key])


def _moments(
    source: UniversalFolder, optimizer: BlockwiseOptimizer, flat: torch.Tensor, fragments: Any
) -> dict[str, Any]:
    """A flat tensor's state with element-shaped moments, or an empty one where no parameter in it was ever stepped."""
    states = _state_names(optimizer)
    state: dict[str, Any] = {key: torch.zeros(flat.numel()) for key in states}
    steps = set()
    for fragment in fragments:
        if not source.has_states(fragment.name, states):
            continue
        steps.add(source.step(fragment.name))
        for key in states:
            values = source.values(fragment.name, key, optimizer.block_map[fragment.name].numel)
            state[key][fragment.offset : fragment.offset + fragment.numel] = values[
                fragment.start : fragment.start + fragment.numel
            ]
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters of one param group were saved at different steps {sorted(map(str, steps))}; "
            f"the universal checkpoint is mixed from several"
        )
    return {**state, "step": steps.pop()} if steps else {}


def _state_dict(
    source: UniversalFolder, optimizer: BlockwiseOptimizer, moments: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """What the optimizer would have saved, had it held these shards."""
    saved = source.param_groups()
    steps = [group.get("step") for group in saved]
    groups, states, position = [], {}, 0
    for number, group in enumerate(optimizer.param_groups):
        indices = list(range(position, position + len(group["params"])))
        position += len(indices)
        if number < len(saved):
            groups.append({**saved[number], "params": indices})
        for index, tensor in zip(indices, group["params"]):
            state = moments[id(tensor)]
            if state and state["step"] is None:
                state["step"] = steps[number] if number < len(steps) else None
            states[index] = state
    return {"state": states, "param_groups": groups + saved[len(groups) :]}


@torch.no_grad()
def load_weights(wrapper: Any, optimizer: BlockwiseOptimizer, source: UniversalFolder) -> None:
    """Loads the weights alone. (For ZeRO-1 and 2 DeepSpeed copies them to the model itself, once all is loaded.)"""
    for flat, fragments in optimizer.attached_shards.flats:
        for fragment in fragments:
            values = source.values(fragment.name, "fp32", optimizer.block_map[fragment.name].numel)
            flat.view(-1)[fragment.offset : fragment.offset + fragment.numel] = values[
                fragment.start : fragment.start + fragment.numel
            ].to(flat.device)
    if is_a(wrapper, ZERO3):
        copy_to_low_precision(wrapper)


def model_state_files(found: list[str], pattern: str) -> list[str]:
    """The model state file a universal load reads counters and schedulers from.

    DeepSpeed looks for the name that the loading ZeRO stage would have given it; here any stage's is taken.

    Args:
        found: what DeepSpeed found.
        pattern: the glob it used.
    """
    if found:
        return found
    folder = Path(pattern).parent
    return sorted(map(str, folder.glob("mp_rank_*_model_states.pt"))) or sorted(
        map(str, folder.glob("zero_pp_rank_0_mp_rank_*_model_states.pt"))
    )
