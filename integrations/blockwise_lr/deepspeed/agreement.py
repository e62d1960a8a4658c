"""What must be equal on all ranks is compared when an engine is built, before DeepSpeed's first collective.

Ranks with other settings, other optimizers or other models hang in DeepSpeed's broadcasts, or train on, each shard with
its own rank's learning rates. Each rank tells the others what it is about to train, in one exchange, and all of them
come to the same verdict.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule

from ..blocks import BlockError
from ..blocks.marks import marks_of
from ..blocks.types import finite, shown
from ..collective.agreement import Difference, find_difference, gathered
from ..collective.errors import raise_on_all_ranks
from ..optim.base import BlockwiseOptimizer
from ..patches.deepspeed_variants import PRECISION
from ..patches.upstream_deepspeed import UPSTREAM
from .build import OPTIMIZER_TYPES
from .names import check_names, is_misspelt
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
    ours, settings = _is_ours(optimizer, config), {}
    peers: tuple[int, ...] = ()
    error: Exception | None = None
    try:
        settings = {**_settings_of(optimizer, config), **_scheduler_of(lr_scheduler, config), **_run_of(config)}
        peers = _peers(model, mpu)
        if ours:
            check_names(config)
            _check_config(config)
            refuse_unsupported(config, model, optimizer, mesh_device)
    except Exception as problem:  # the other ranks wait for this one's answer
        error = problem
    _set_device(args)
    if not any(gathered(ours)):
        return
    _refuse(find_difference({"the optimizer": _class_of(optimizer, config)}))
    raise_on_all_ranks(error, "starting the engine")
    _refuse(find_difference(settings))
    rows = {f"parameter {number} of the model": row for number, row in enumerate(_parameters(model))}
    _refuse(find_difference(rows, peers=peers), _FIX_MODEL, absent="missing")


def compare_made(optimizer: Any, model: torch.nn.Module, mpu: Any) -> None:
    """Compares what a client's function made on each rank; does nothing where no rank's is ours.

    Raises:
        BlockError: another class, other param groups or other settings among the ranks that train the same parameters;
            the same on every rank.
    """
    groups = _groups_of(optimizer) if isinstance(optimizer, BlockwiseOptimizer) else {}
    if not any(gathered(bool(groups))):
        return
    _refuse(find_difference({"the optimizer": f"of class {type(optimizer).__name__}"}))
    _refuse(find_difference(groups, peers=_peers(model, mpu)), _FIX_GROUPS)


def compare_slices(optimizer: BlockwiseOptimizer) -> None:
    """Compares the slices that AutoTP has cut; a checkpoint's record describes those of all ranks by one rank's.

    Raises:
        BlockError: ranks hold slices of other sizes; the same on every rank.
    """
    slices = {name: f"{name} {layout.shape}" for name, layout in optimizer.block_map.items()}
    fix = "choose sizes (as of the vocabulary) that tensor_parallel.autotp_size divides"
    _refuse(find_difference(slices), fix, what="a tensor-parallel slice")


def _refuse(difference: Difference | None, fix: str = FIX, *, what: str = "", absent: str = "unset") -> None:
    if difference is not None:
        raise BlockError(
            f"the ranks would not train alike: {what or difference.place} is {difference.told(absent=absent)}; {fix}"
        )


# ---- what a rank tells


def is_callable(optimizer: Any) -> bool:
    """Whether a client's optimizer is a function that makes one of model parameters."""
    return callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer)


def _is_ours(optimizer: Any, config: Any) -> bool:
    if optimizer is None:
        return config.optimizer_name in OPTIMIZER_TYPES or is_misspelt(config)
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
    sections = {"zero_optimization": config.zero_config.model_dump(), **PRECISION.here(config)}
    for section, settings in sections.items():
        found.update({f"{section}.{key}": value for key, value in settings.items()})
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


def _check_config(config: Any) -> None:
    """That what is read of a ds_config is called as it was: a setting of another name would go uncompared."""
    zero = config.zero_config
    precision = (getattr(config, name, None) for name in ("float16_config", "bfloat16_config"))
    UPSTREAM.check_instance(config, zero, *precision, config.tensor_parallel_config, zero.offload_optimizer)


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


def _set_device(args: Any) -> None:
    """As the engine does a little later; NCCL takes each rank's own device for an exchange."""
    device = getattr(args, "device_rank", int(os.environ.get("LOCAL_RANK", -1)))
    if device >= 0 and dist.is_initialized():
        get_accelerator().set_device(device)
