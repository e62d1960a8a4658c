"""What must be equal on all ranks is compared when an engine is built, before DeepSpeed's first collective.

Ranks with other settings, other optimizers or other models hang in DeepSpeed's broadcasts, or train on, each shard with
its own rank's learning rates. Each rank tells the others what it is about to train, in one exchange, and all of them
come to the same verdict.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule

from ..blocks import BlockError
from ..blocks.marks import marks_of
from ..blocks.types import finite, shown
from ..optim.base import BlockwiseOptimizer
from .build import OPTIMIZER_TYPES
from .unsupported import refuse_unsupported

FIX = "give every rank the same ds_config and optimizer"
_FIX_GROUPS = "give deepspeed.initialize the same param groups on every rank"
_FIX_MODEL = "build the same model on every rank, with the same parameters frozen, before deepspeed.initialize"
_LOCAL = ("kernel", "nvme_path")  # may differ between ranks without changing what is computed


def compare_ranks(
    args: Any, model: torch.nn.Module, optimizer: Any, lr_scheduler: Any, mpu: Any, config: Any, mesh_device: Any
) -> None:
    """Compares what the ranks are about to train with; does nothing where no rank has an optimizer of ours.

    Collective over all ranks of the default group. The arguments are those of DeepSpeedEngine.

    Raises:
        BlockError: something differs, or a rank asks for what blockwise optimizers do not support; the same on every
            rank.
    """
    rows = _parameters(model)
    ours = _is_ours(optimizer, config)
    mine: dict[str, Any] = {
        "ours": ours,
        "error": None,
        "optimizer": _class_of(optimizer, config),
        "settings": {},
        "peers": (),
        "digest": _digest(rows),
    }
    try:
        mine["settings"] = {**_settings_of(optimizer, config), **_scheduler_of(lr_scheduler, config), **_run_of(config)}
        mine["peers"] = _peers(model, mpu)
        if ours:
            refuse_unsupported(config, model, optimizer, mesh_device)
    except Exception as error:  # the other ranks wait for this one's answer
        mine["error"] = str(error) if isinstance(error, BlockError) else f"{type(error).__name__}: {error}"
    answers = _exchange(args, mine)
    if not any(answer["ours"] for answer in answers):
        return
    _refuse_difference([answer["optimizer"] for answer in answers], "the optimizer", FIX)
    failed = next((answer["error"] for answer in answers if answer["error"]), None)
    if failed:
        raise BlockError(failed)
    for key in dict.fromkeys(key for answer in answers for key in answer["settings"]):
        _refuse_difference([answer["settings"].get(key, "unset") for answer in answers], key, FIX)
    if _differs_among_peers(answers, "digest"):
        _refuse_models(_exchange(args, {"peers": mine["peers"], "rows": rows}))


def compare_made(optimizer: Any, model: torch.nn.Module, mpu: Any) -> None:
    """Compares what a client's function made on each rank; does nothing where no rank's is ours.

    Raises:
        BlockError: another class, other param groups or other settings among the ranks that train the same parameters;
            the same on every rank.
    """
    groups = _groups_of(optimizer) if isinstance(optimizer, BlockwiseOptimizer) else {}
    answers = _exchange(
        None,
        {
            "ours": bool(groups),
            "optimizer": f"of class {type(optimizer).__name__}",
            "settings": groups,
            "peers": _peers(model, mpu),
        },
    )
    if not any(answer["ours"] for answer in answers):
        return
    _refuse_difference([answer["optimizer"] for answer in answers], "the optimizer", FIX)
    if _differs_among_peers(answers, "settings"):
        for ranks, values in _by_peers(answers, "settings"):
            for key in dict.fromkeys(key for value in values for key in value):
                _refuse_difference([value.get(key, "unset") for value in values], key, _FIX_GROUPS, ranks)


def compare_slices(optimizer: BlockwiseOptimizer) -> None:
    """Compares the slices that AutoTP has cut; a checkpoint's record describes those of all ranks by one rank's.

    Raises:
        BlockError: ranks hold slices of other sizes; the same on every rank.
    """
    answers = _exchange(None, {"shapes": [f"{name} {layout.shape}" for name, layout in optimizer.block_map.items()]})
    for slices in zip(*(answer["shapes"] for answer in answers)):
        _refuse_difference(
            slices,
            "a tensor-parallel slice",
            "choose sizes (as of the vocabulary) that tensor_parallel.autotp_size divides",
        )


# ---- what a rank tells


def is_callable(optimizer: Any) -> bool:
    """Whether a client's optimizer is a function that makes one of model parameters."""
    return callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer)


def _is_ours(optimizer: Any, config: Any) -> bool:
    if optimizer is None:
        return config.optimizer_name in OPTIMIZER_TYPES
    return isinstance(optimizer, BlockwiseOptimizer)


def _class_of(optimizer: Any, config: Any) -> str:
    if optimizer is None:
        return f"{config.optimizer_name} of the ds_config"
    return "made by a function" if is_callable(optimizer) else f"an object of class {type(optimizer).__name__}"


def _settings_of(optimizer: Any, config: Any) -> dict[str, str]:
    if optimizer is None:
        return {
            f"optimizer.params.{key}": _plain(value)
            for key, value in (config.optimizer_params or {}).items()
            if key not in _LOCAL
        }
    return _groups_of(optimizer) if isinstance(optimizer, BlockwiseOptimizer) else {}


def _groups_of(optimizer: BlockwiseOptimizer) -> dict[str, str]:
    """Settings and members of the param groups of an optimizer."""
    found = {"the optimizer's bias_segments": _plain(optimizer.bias_segments)}
    for number, (group, settings) in enumerate(zip(optimizer.param_groups, optimizer.initial_settings)):
        names = [optimizer.block_map.name_of(p) for p in group["params"]]
        found.update({f"{key} of param group {number}": _plain(value) for key, value in settings.items()})
        found[f"the parameters of param group {number}"] = f"{len(names)} parameters ({_digest(names)[:8]})"
    return found


def _scheduler_of(scheduler: Any, config: Any) -> dict[str, str]:
    if scheduler is None:
        params = {f"scheduler.params.{key}": _plain(value) for key, value in (config.scheduler_params or {}).items()}
        return {"scheduler.type": _plain(config.scheduler_name), **params}
    if callable(scheduler) and not hasattr(scheduler, "step"):
        return {"scheduler.type": "made by a function"}
    numbers = {
        key: value
        for key, value in vars(scheduler).items()
        if not key.startswith("_") and isinstance(value, (int, float, str, list, tuple))
    }
    return {
        "scheduler.type": f"an object of class {type(scheduler).__name__}",
        **{f"the scheduler's {key}": _plain(value) for key, value in numbers.items()},
    }


def _run_of(config: Any) -> dict[str, str]:
    """Settings of the engine that change the step or how the optimizer's state is cut."""
    found = {
        key: getattr(config, key, None)
        for key in (
            "gradient_clipping",
            "gradient_accumulation_steps",
            "communication_data_type",
            "prescale_gradients",
            "gradient_predivide_factor",
            "torch_autocast_enabled",
        )
    }
    for section, settings in (
        ("zero_optimization", config.zero_config),
        ("fp16", config.float16_config),
        ("bf16", config.bfloat16_config),
    ):
        found.update({f"{section}.{key}": value for key, value in settings.model_dump().items()})
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> str:
    """A value as text that is equal where the values are: 1 and 1.0, tuples and lists are."""
    if isinstance(value, Mapping):
        value = {str(key): entry for key, entry in value.items() if key not in _LOCAL}
    return json.dumps(_numbers(value), sort_keys=True, default=str, ensure_ascii=False)


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _numbers(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(entry) for entry in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return finite(value) if finite(value) is not None else shown(value)
    return value


def _parameters(model: torch.nn.Module) -> list[str]:
    """Every parameter in the order of definition, as a line of text."""
    return [
        f"{name} {marks_of(p).shape or tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}, "
        f"{'trained' if p.requires_grad else 'frozen'}"
        for name, p in model.named_parameters()
    ]


def _digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest()


def _peers(model: torch.nn.Module, mpu: Any) -> tuple[int, ...]:
    """The ranks that train the same parameters as this one."""
    if isinstance(model, PipelineModule):
        return tuple(dist.get_process_group_ranks(model.mpu().get_data_parallel_group()))
    for name in ("get_sequence_data_parallel_group", "get_data_parallel_group"):
        if hasattr(mpu, name):
            return tuple(dist.get_process_group_ranks(getattr(mpu, name)()))
    return tuple(range(dist.get_world_size())) if dist.is_initialized() else (0,)


def _exchange(args: Any, mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    device = getattr(args, "device_rank", int(os.environ.get("LOCAL_RANK", -1)))
    if device >= 0:  # as the engine does a little later; NCCL takes each rank's own device for the exchange
        get_accelerator().set_device(device)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return answers


# ---- the verdict


def _by_peers(answers: Sequence[Mapping[str, Any]], key: str) -> list[tuple[list[int], list[Any]]]:
    """Per set of ranks that train the same parameters, in the order of ranks: the ranks and their answers."""
    sets = dict.fromkeys(answer["peers"] for answer in answers)
    members = [[rank for rank in peers if answers[rank]["peers"] == peers] for peers in sets]
    return [(ranks, [answers[rank][key] for rank in ranks]) for ranks in members]


def _differs_among_peers(answers: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(value != values[0] for _, values in _by_peers(answers, key) for value in values)


def _refuse_models(answers: Sequence[Mapping[str, Any]]) -> None:
    for ranks, models in _by_peers(answers, "rows"):
        for number in range(max(map(len, models))):
            rows = [model[number] if number < len(model) else "missing" for model in models]
            _refuse_difference(rows, f"parameter {number} of the model", _FIX_MODEL, ranks)


def _refuse_difference(values: Sequence[str], what: str, mend: str, ranks: Sequence[int] | None = None) -> None:
    found: dict[str, list[int]] = {}
    for rank, value in zip(range(len(values)) if ranks is None else ranks, values):
        found.setdefault(value, []).append(rank)
    if len(found) > 1:
        told = " and ".join(f"{value} on rank{'s' if len(at) > 1 else ''} {_ranges(at)}" for value, at in found.items())
        raise BlockError(f"the ranks would not train alike: {what} is {told}; {mend}")


def _ranges(ranks: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
