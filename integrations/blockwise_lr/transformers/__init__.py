"""Hugging Face integration: optimizer factories for the Trainer, and public models of every family.

Not needed with DeepSpeed: use ``TrainingArguments(deepspeed=...)`` and ``import blockwise_lr.deepspeed``.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "blockwise_lr.transformers needs transformers, which is not installed; pip install 'blockwise-lr[transformers]', or "
        "'.[transformers]' in a checkout",
        name="transformers",
    )

from .guard import GuardCallback
from .metrics import BlockMetricsCallback
from .sequence_length import SequenceLengthCallback
from .sharpness import SharpnessCallback
from .trainer import FACTORIES, OptimizerFactory

__all__ = [
    "FACTORIES",
    "BlockMetricsCallback",
    "GuardCallback",
    "OptimizerFactory",
    "SequenceLengthCallback",
    "SharpnessCallback",
    *FACTORIES,
]


def __getattr__(name: str) -> type[OptimizerFactory]:
    try:
        return FACTORIES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
