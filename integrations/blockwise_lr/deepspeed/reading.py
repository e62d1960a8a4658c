"""Reading DeepSpeed's checkpoint files without running code that lies in them."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ..checkpoint.errors import CheckpointError
from ..patches.deepspeed_instances import MAPPED_LOADS

# what DeepSpeed's ZeRO puts into its files beside tensors, numbers and text
_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _stage(kind: Any, name: str) -> Any:
    """What ``getattr`` stands for in files that early releases of Python 3.11 wrote, which pickle members of enums by name."""
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"getattr of {name!r} is not read; only members of ZeroStageEnum are")
    return ZeroStageEnum[name]


_ALLOWED = [*_CLASSES, *((_stage, f"{module}.getattr") for module in ("builtins", "__builtin__"))]
_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
# what DeepSpeed, or our load_state_dict, copies to memory of its own
_COPIED = ("single_partition_of_fp32_groups", "fp32_flat_groups", "base_optimizer_state", "optimizer_state_dict")


def read(path: str | os.PathLike, *, mapped: bool = False) -> Any:
    """What torch.save wrote to a file, on the CPU: tensors, plain values and DeepSpeed's own classes.

    Args:
        mapped: tensors are read from the file when they are used, which must stay as it is until then.

    Raises:
        CheckpointError: the file is missing or damaged.
        pickle.UnpicklingError: it holds objects of other classes (from ``client_state``, as a rule), or a damaged pickle.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and _is_archive(path))
    except pickle.UnpicklingError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # a damaged archive raises almost anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def weights_mapped(checkpoint_engine: Any) -> Iterator[None]:
    """Meanwhile DeepSpeed gets files with tensors mapped where they are copied at once to where they belong, or where it
    only looks into the file: its optimizer files, and a model file's weights the first time that it reads it.

    It would read them to memory first, which takes as long as all of our checks.
    """
    load, seen = checkpoint_engine.load, set()

    def load_mapped(path: str, map_location: Any = None) -> Any:
        states = _STATES.fullmatch(os.path.basename(path))
        if not states and path in seen:
            return load(path, map_location=map_location)
        seen.add(path)
        try:
            found = read(path, mapped=True)
        except pickle.UnpicklingError:
            found = None
        if type(found) is not dict or ("optimizer_state_dict" if states else "module") not in found:
            return load(path, map_location=map_location)
        if not states:
            return {key: value if key == "module" else _own(value) for key, value in found.items()}
        zero = found["optimizer_state_dict"]
        return {
            **found,
            "optimizer_state_dict": {key: value if key in _COPIED else _own(value) for key, value in zero.items()},
        }

    with MAPPED_LOADS.during(checkpoint_engine, load=load_mapped):
        yield


def _own(value: Any) -> Any:
    """The same with tensors in memory of their own: the file may change later."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    return [_own(item) for item in value] if type(value) is list else value


def _is_archive(path: str | os.PathLike) -> bool:
    """Whether it is one of torch's archives, which can be mapped, and not of the form before torch 1.6."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
