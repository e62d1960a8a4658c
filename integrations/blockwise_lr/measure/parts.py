"""What all measurements share: a model's predictions, which element is of which block type, and leaving no trace."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ..blocks import BlockError, BlockMap, BlockType
from ..blocks.block_map import full_shape
from ..blocks.marks import marks_of
from ..plan.shards import Fragment
from ..plan.step_plan import CLASS, INNER, OUTER, StepPlan, element_plan
from ..plan.views import runs_of

IGNORED = -100  # a target that does not count, as in torch's cross_entropy
Predictions = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, torch.Tensor]]


def causal_lm(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(predictions, vocabulary) logits of a Hugging Face causal language model, and their targets (predictions,).

    Args:
        batch: token ids (sequences, length), or the model's arguments by name. The last position of a sequence predicts
            nothing. The targets are the next tokens, or those of ``labels``, where -100 does not count.
    """
    arguments = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    labels = arguments.pop("labels", arguments["input_ids"])
    output: Any = model(**arguments) if _takes(model, "input_ids") else None
    if not hasattr(output, "logits"):
        raise BlockError(
            f"{type(model).__name__} is not called as transformers' models are, with input_ids=... and .logits in what it "
            f"returns; give predictions=, a function of (model, batch) that returns logits and targets"
        )
    logits = output.logits[:, :-1]
    return logits.flatten(0, 1), labels[:, 1:].to(logits.device).flatten()


def _takes(model: torch.nn.Module, name: str) -> bool:
    """Whether a model's forward pass takes an argument of that name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def several_times(batches: Callable[[], Iterable[Any]] | Iterable[Any]) -> Callable[[], Iterable[Any]]:
    """A function that returns batches each time it is called; a list of them is returned as it is.

    Raises:
        BlockError: an iterator, which the first call would use up.
    """
    if callable(batches):
        return batches
    if isinstance(batches, Iterator):
        raise BlockError(
            "batches is an iterator, which one measurement uses up; give a list, or a function that returns it"
        )
    return lambda: batches


def read_batches(file: Path, length: int, sequences: int, count: int) -> list[torch.Tensor]:
    """Batches (sequences, length) of token ids from a file, evenly spread over it.

    Args:
        file: ``.npy``, one axis of integers; or any other ending, uint16.

    Raises:
        BlockError: a size below 1, or too few tokens in the file.
    """
    for name, value in (("length", length), ("batch", sequences), ("batches", count)):
        if value < 1:
            raise BlockError(f"{name} is {value}; give at least 1")
    ids = np.load(file, mmap_mode="r") if file.suffix == ".npy" else np.memmap(file, dtype=np.uint16, mode="r")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or len(ids) < length * sequences * count:
        raise BlockError(
            f"{file} holds {ids.dtype} of shape {ids.shape}, where {count} x {sequences} x {length} token ids in a row are "
            f"needed; give a longer file, or fewer or shorter sequences"
        )
    starts = np.linspace(0, len(ids) - length, sequences * count).astype(np.int64)
    rows = [torch.from_numpy(ids[start : start + length].astype(np.int64)) for start in starts]
    return [torch.stack(rows[first::count]) for first in range(count)]


class BlockParts:
    """Which elements of a model's trained parameters are of which block type.

    Args:
        gathered_in_use: take parameters that FSDP2 or ZeRO-3 shards, and gathers whenever they are used.
        slices: take tensor-parallel slices; the block map is of slices too.

    Raises:
        BlockError: a parameter that is sharded (but for these) or sliced over ranks, or that the block map does not know.
    """

    def __init__(
        self, model: torch.nn.Module, block_map: BlockMap, *, gathered_in_use: bool = False, slices: bool = False
    ) -> None:
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, p in self.named:
            if not slices:
                _refuse_slices(name, p)
            _refuse_shards(name, p, gathered_in_use)
        self.plans: Mapping[str, StepPlan] = {name: _plan(block_map, name, p) for name, p in self.named}

    @property
    def blocks(self) -> list[BlockType]:
        """The block types of the model."""
        found = {of.block for plan in self.plans.values() for of in plan.classes}
        return [block for block in BlockType if block in found]

    def views(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[BlockType, torch.Tensor]]:
        """The parts of a contiguous tensor of a parameter's shape by block type, as views of two axes."""
        flat, plan = tensor.view(-1), self.plans[name]
        for row in plan.local.table:
            yield plan.classes[int(row[CLASS])].block, runs_of(flat, row)

    def numel(self, name: str, block: BlockType) -> int:
        """Elements of a block type in a parameter."""
        plan = self.plans[name]
        rows = (row for row in plan.local.table if plan.classes[int(row[CLASS])].block is block)
        return sum(int(row[OUTER] * row[INNER]) for row in rows)


def _plan(block_map: BlockMap, name: str, p: torch.Tensor) -> StepPlan:
    known = block_map.name_of(p) or name
    if known not in block_map:
        raise BlockError(f"{name} of shape {tuple(full_shape(p))} is in no block; make the block_map from this model")
    numel = math.prod(full_shape(p))
    return element_plan(numel, [Fragment(known, 0, numel, 0)], [block_map[known]])


def _refuse_slices(name: str, p: torch.Tensor) -> None:
    if marks_of(p).split_axis is not None or (isinstance(p, DTensor) and not _is_fully_sharded(p)):
        raise BlockError(
            f"{name} is sliced by tensor parallelism, and this is measured on whole parameters; load a checkpoint into one "
            f"process, or measure without tensor parallelism (a Megatron model by blockwise_lr.megatron.measure_sharpness)"
        )


def _refuse_shards(name: str, p: torch.Tensor, gathered_in_use: bool) -> None:
    if not gathered_in_use and (isinstance(p, DTensor) or full_shape(p) != tuple(p.shape)):
        raise BlockError(
            f"{name} is sharded over ranks (FSDP2 or ZeRO-3), and this is measured on whole parameters; load a checkpoint "
            f"into one process, or measure under DDP or ZeRO 0 to 2"
        )


def _is_fully_sharded(p: DTensor) -> bool:
    """Whether it is FSDP2's: cut along at most one axis of its mesh, and replicated along the others."""
    return sum(not placement.is_replicate() for placement in p.placements) <= 1


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; modes and random number generators are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
