"""transformers' Trainer: a step's loss, for callbacks, which are told everything else."""

from __future__ import annotations

from .instances import InstancePatch
from .symbols import Symbol
from .transformers_batches import PACKAGE, VERSIONS

LOSSES = InstancePatch(
    name="transformers-losses",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol("transformers.trainer:Trainer.training_step", ("self", "model", "inputs", "num_items_in_batch")),),
    why="callbacks are called after a step without its loss, and the log has means over many steps",
    until="the Trainer tells callbacks the loss of a step",
)
INSTANCE_PATCHES = (LOSSES,)
