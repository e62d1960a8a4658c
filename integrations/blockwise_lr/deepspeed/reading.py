"""Reading DeepSpeed's checkpoint files without running code that lies in them."""
from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ..checkpoint.errors import CheckpointError

# what DeepSpeed's ZeRO puts into its files beside tensors, numbers and text
_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def read(path: str | os.PathLike, *, mapped: bool = False) -> Any:
    """What torch.save wrote to a file, on the CPU: tensors, plain values and DeepSpeed's own classes.

    Args:
        mapped: tensors are read from the file when they are used, which must stay as it is until then.

    Raises:
        CheckpointError: the file is missing or damaged.
        pickle.UnpicklingError: it holds objects of other classes (from ``client_state``, as a rule), or a damaged pickle.
    """
    try:
        with torch.serialization.safe_globals(_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and _is_archive(path))
    except pickle.UnpicklingError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # a damaged archive raises almost anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _is_archive(path: str | os.PathLike) -> bool:
    """Whether it is one of torch's archives, which can be mapped, and not of the form before torch 1.6."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
