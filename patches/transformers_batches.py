"""transformers' Trainer: batches of a sequence length warmup are cut before the Trainer counts their labels.

It divides the sum of a step's losses by the labels of all its micro batches, which it counts as they were read: with rows that
are cut later, in the model, losses and gradients would be too small by how much was cut. Trainers whose model has no warmup go
on as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol

PACKAGE, VERSIONS = "transformers", ">=5.0,<6"


@dataclass(frozen=True)
class Hooks:
    """``cut``: given a Trainer, what cuts its batches; None where nothing does."""

    cut: Callable[[Any], Callable[[Any], Any] | None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from transformers import Trainer

    original = Trainer.get_batch_samples

    @functools.wraps(original)
    def get_batch_samples(self: Any, epoch_iterator: Any, *arguments: Any, **keywords: Any) -> Any:
        cut = hooks.cut(self)
        return original(self, epoch_iterator if cut is None else map(cut, epoch_iterator), *arguments, **keywords)

    undo.set(Trainer, "get_batch_samples", get_batch_samples)


PATCH = Patch(
    name="transformers-batches",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol("transformers.trainer:Trainer.get_batch_samples", ("self", "epoch_iterator", "num_batches", "device")),
    ),
    why="a step's labels are counted before the model, or any callback, sees its batches",
    until="the Trainer has a hook between reading a batch and counting its labels",
    install=_install,
    hooks=Hooks,
)
