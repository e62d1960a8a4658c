"""From what ZeRO saved to a universal checkpoint, by DeepSpeed's own converter (``ds_to_universal``).

The converter takes second moments of the parameters' shape, and believes the files (ZeRO-1 and 2) or a rule of its own
(ZeRO-3) about where a parameter lies in a flat tensor. So it is given files with Adam-mini's second moments spread over
the elements of their segments and the true places, and what it would put together wrongly is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..blocks.block_map import plain_name
from ..checkpoint.errors import CheckpointError
from ..checkpoint.manifest import Manifest, hash_files, mark_complete, mark_incomplete
from ..checkpoint.moments import expand_segments
from ..checkpoint.record import ELEMENTS, SEGMENTS, Record, by_names
from ..checkpoint.survey import verify
from ..patches.deepspeed_variants import CONVERTS_ONE_FLAT
from ..plan.shards import Fragment
from ..plan.step_plan import StepPlan, segment_plan
from .flats import KEY, ordering_settings, slice_mappings
from .reading import read

_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Contents = list[list[Any]]
# what DeepSpeed's converter takes out of every state, whatever the optimizer keeps; zeros where ours keeps less
_CONVERTED = ("exp_avg", "exp_avg_sq")


def convert(
    checkpoint: str, output: str, *, workers: int = 1, run: Callable[[argparse.Namespace], None] | None = None
) -> None:
    """Converts a checkpoint folder of a ZeRO engine into a universal one, and points ``latest_universal`` to it.

    Needs up to three times the size of the weights and optimizer state (12 bytes a parameter) on disk while it runs.

    Args:
        checkpoint: a tag's folder, as ``save_checkpoint`` has made it; checked where it has a manifest.
        output: the new folder, usually beside it; must be empty or absent.
        workers: parallel processes.
        run: the converter; DeepSpeed's by default.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, its parameters cannot be put together from its flat
            tensors, or the output exists.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    origin = Manifest.read(checkpoint)
    if origin is not None:
        verify(checkpoint)
    elif not Path(checkpoint).is_dir():
        raise CheckpointError(f"there is no checkpoint {checkpoint}")
    if Path(output).is_dir() and any(Path(output).iterdir()):
        raise CheckpointError(
            f"{output} exists; name another folder, or remove it if it is left from a conversion "
            f"that did not finish: nothing is overwritten"
        )
    output = os.path.abspath(output)
    with _source(checkpoint, origin, Path(output).parent) as source:
        mark_incomplete(output)
        try:
            (run or main)(
                argparse.Namespace(
                    input_folder=source,
                    output_folder=output,
                    num_extract_workers=workers,
                    num_merge_workers=workers,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        except Exception as error:  # it checks little, and fails on what it does not know with almost anything
            shutil.rmtree(output)
            raise CheckpointError(
                f"DeepSpeed's converter fails on {checkpoint} ({type(error).__name__}: {error}); go on in "
                f"the layout it was saved in"
            ) from error
    files = [path for path in Path(output).rglob("*.pt") if path.is_file()]
    mark_complete(
        output,
        hash_files(output, files, 0),
        origin.steps if origin else 0,
        _of_elements(origin.record) if origin and origin.record else None,
    )


def _of_elements(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of state whose second moments have been spread over elements."""
    return {**record, "second_moment": ELEMENTS}


@contextlib.contextmanager
def _source(checkpoint: str, origin: Manifest | None, beside: Path) -> Iterator[str]:
    """A folder for the converter: links to the checkpoint's own files (it takes whatever it finds in a folder, also what
    a killed save on more ranks has left there), and rewritten ones in place of those that it would misread."""
    names = list(origin.files) if origin is not None else [path.name for path in Path(checkpoint).iterdir()]
    if not any(_STATES.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{checkpoint} holds no optimizer state of ZeRO (zero_pp_rank_*_optim_states.pt); universal "
            f"checkpoints are made of those that were saved with ZeRO stage 1 to 3 only"
        )
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=beside) as folder:
        held: dict[str, Contents] = {}
        for name in names:
            source, target = Path(checkpoint, name).absolute(), Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            states = _read(source) if _STATES.fullmatch(name) else None
            if states is not None:
                _check_known(checkpoint, name, states)
                held[name] = states.get(KEY, {}).get("flats")
            if not (states is not None and _rewrite(states, target)):
                target.symlink_to(source)
        held = {name: flats for name, flats in held.items() if flats is not None}
        _check_tiling(checkpoint, held)
        _check_zero3(checkpoint, held)
        yield folder


def _read(path: Path) -> dict[str, Any]:
    try:
        return read(path, mapped=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, numbers and DeepSpeed's own classes, or is damaged "
            f"({str(error).partition('.')[0]}); it is not converted"
        ) from error


def _check_known(checkpoint: str, name: str, states: Mapping[str, Any]) -> None:
    """Refuses files whose slice mappings are wrong and that do not say what is right."""
    zero = states.get("optimizer_state_dict") or {}
    if (
        KEY not in states
        and "param_slice_mappings" in zero
        and ordering_settings(states.get("ds_config")).get("round_robin_gradients")
    ):
        raise CheckpointError(
            f"{checkpoint}/{name} was saved with round_robin_gradients by DeepSpeed alone or an older blockwise-lr, "
            f"which noted wrong places of its parameters; load it in the layout it was saved in, save it again with "
            f"this version, and convert that"
        )


# ---- files as the converter understands them


def _rewrite(states: dict[str, Any], target: Path) -> bool:
    """Writes a file with element-shaped second moments and the true slice mappings, where it needs that."""
    zero = states["optimizer_state_dict"]
    key = next((key for key in ("base_optimizer_state", "optimizer_state_dict") if key in zero), None)
    base, flats = zero.get(key), states.get(KEY, {}).get("flats")
    if flats is None or not isinstance(base, Mapping):
        return False
    known = Record.of_groups(base["param_groups"])
    if known is None:
        return False
    states_of_rule = known.rule.states if known.rule is not None else ()
    in_segments = {spec.name for spec in states_of_rule if spec.per == "segment" and known.second_moment == SEGMENTS}
    missing = [name for name in _CONVERTED if states_of_rule and name not in {spec.name for spec in states_of_rule}]
    if not in_segments and not missing:
        return False  # the slice mappings were put right when it was saved
    found = dict(base["state"])
    indices = [index for group in base["param_groups"] for index in group["params"]]
    for index, (numel, fragments) in zip(indices, flats, strict=True):
        if not found.get(index):
            continue
        state = dict(found[index])
        for name in in_segments & state.keys():
            state[name] = _elements(state[name], numel, fragments, known, target.name)
        state.update({name: torch.zeros(numel) for name in missing})
        found[index] = state
    rewritten = {**zero, key: {**base, "state": found, "param_groups": by_names(base["param_groups"])}}
    if "param_slice_mappings" in zero:
        rewritten["param_slice_mappings"] = slice_mappings(flats)
    torch.save({**states, "optimizer_state_dict": rewritten}, target)
    return True


def _elements(moments: torch.Tensor, numel: int, fragments: list[list[Any]], record: Record, name: str) -> torch.Tensor:
    """A flat tensor's state per element, (numel,), from that of its segments."""
    plan = _plan(numel, [Fragment(*fragment) for fragment in fragments], record)
    if len(moments) != plan.slots:
        raise CheckpointError(
            f"{name} has {len(moments)} second moments where its record tells of "
            f"{plan.slots}; it is damaged, load another checkpoint"
        )
    return expand_segments(moments, plan)


def _plan(numel: int, fragments: list[Fragment], record: Record) -> StepPlan:
    layouts = [record.layout(fragment.name) for fragment in fragments]
    if record.rule is not None:
        layouts = [record.rule.segments(layout, record.bias_segments) for layout in layouts]
    return segment_plan(numel, fragments, layouts)


# ---- what the converter would put together wrongly


def _check_tiling(checkpoint: str, held: Mapping[str, Contents]) -> None:
    """Refuses parameters whose parts, joined by rank, are not the whole of them: DeepSpeed's converter joins just so."""
    parts: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for name, flats in held.items():
        match = _STATES.fullmatch(name)
        if match is None:
            continue
        rank, slice_ = match.groups()
        for _, fragments in flats:
            for parameter, start, numel, _ in fragments:
                parts.setdefault((slice_, parameter), []).append((int(rank), start, numel))
    for (_, parameter), found in parts.items():
        end = 0
        for rank, start, numel in sorted(found):
            if start != end:
                raise CheckpointError(
                    f"{checkpoint} cannot be converted: what its ranks hold of {parameter} does not follow one "
                    f"another (rank {rank} holds elements {start} to {start + numel}, after {end}), as with experts "
                    f"that differ from rank to rank; go on in the layout it was saved in"
                )
            end = start + numel


def _check_zero3(checkpoint: str, held: Mapping[str, Contents]) -> None:
    """Refuses ZeRO-3's flat tensors that do not hold their parameters in the order the converter takes them for."""
    for name, flats in held.items():
        model = Path(checkpoint, name.removeprefix("bf16_").replace("_optim_states", "_model_states"))
        if not model.is_file():  # ZeRO-1 or 2, whose files say where parameters lie
            continue
        try:
            shapes = read(model, mapped=True).get("param_shapes") or []
        except pickle.UnpicklingError:  # client_state holds other objects; the order is the same on other ranks
            continue
        if len(flats) > 1 and CONVERTS_ONE_FLAT.here:
            raise CheckpointError(
                f"{checkpoint} cannot be converted: {name} holds {len(flats)} flat tensors (param groups, or parts of "
                f"sub_group_size), and the installed DeepSpeed's converter reads the first alone; convert it with "
                f"DeepSpeed 0.18 or newer, or go on in the layout it was saved in"
            )
        for group, (_, fragments) in zip(shapes, flats):
            inside = {parameter for parameter, *_ in fragments}
            if [parameter for parameter, *_ in fragments] != [plain_name(n) for n in group if plain_name(n) in inside]:
                raise CheckpointError(
                    f"{checkpoint} cannot be converted: {name} holds its parameters in another "
                    f"order than DeepSpeed's converter takes them for; go on in the layout it was "
                    f"saved in"
                )
