"""ShardMaps of Megatron's optimizers: which part of which parameter each tensor of the inner optimizer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..blocks import BlockError, BlockMap, ParamLayout
from ..blocks.marks import marks_of
from ..optim import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit
from ..patches.upstream_megatron import bucketed_parameters, is_distributed, parts_of
from ..plan.shards import even_boundaries, slices_of, spans_slices
from .mapping import slice_group
from .refusals import check_tensors


def shard_map(wrapper: Any, block_map: BlockMap, *, row_parallel_sums: bool = True) -> ShardMap:
    """The ShardMap of what Megatron made of our optimizer.

    Args:
        wrapper: a DistributedOptimizer, Float16OptimizerWithFloat16Params or FP32Optimizer.
        block_map: of this rank's model chunks, their parameters bound.
        row_parallel_sums: state which segments go on in other tensor-parallel ranks' slices.

    Raises:
        BlockError: another kind of wrapper, or tensors that are not those parts of parameters that it states.
        PatchError: the wrapper lacks what its parts are read from.
    """
    parts = parts_of(wrapper)
    if parts is None:
        raise BlockError(
            f"Megatron wrapped the optimizer in {type(wrapper).__name__}, which blockwise_lr does not know; "
            f"use the distributed optimizer or none"
        )
    check_tensors(wrapper.optimizer, ((part.tensor, part.parameter, part.size) for part in parts))
    params = [part.parameter for part in parts]
    flats = [(part.tensor, [Fragment(_name(block_map, part.parameter), part.start, part.size, 0)]) for part in parts]
    cuts = _cuts(wrapper, block_map) if is_distributed(wrapper) else {}
    splits = _splits(params, block_map, wrapper.optimizer.layout_of) if row_parallel_sums else {}
    # the group that Megatron sums its own gradient norm over
    groups = [wrapper.get_grad_stats_parallel_group()] * max(len(flats), 1)
    trained = [held.parameter for held in bucketed_parameters(wrapper)] if is_distributed(wrapper) else params
    slices = slices_of(((_name(block_map, param), param) for param in trained), slice_group)
    return ShardMap(flats, cuts, splits, groups, [_is_counted(param) for param in params] or [False], slices)


def _is_counted(param: torch.Tensor) -> bool:
    """Whether this rank counts a parameter in a norm over all: not a tied embedding's copy, nor a TP rank's whole copy."""
    if getattr(param, "shared", False):
        return False
    return marks_of(param).split_axis is not None or slice_group(param).rank() == 0


def _name(block_map: BlockMap, param: torch.Tensor) -> str:
    name = block_map.name_of(param)
    if name is None:
        raise BlockError(
            f"Megatron's optimizer holds a parameter of shape {tuple(param.shape)} that is in no model chunk"
        )
    return name


def _cuts(wrapper: Any, block_map: BlockMap) -> dict[str, ShardBoundaries]:
    """Where the distributed optimizer's shards end: every bucket of a gradient buffer is cut evenly over the ranks."""
    cuts = {}
    for held in bucketed_parameters(wrapper):
        positions = even_boundaries(held.numel, held.shard, held.start)
        if len(positions):
            # Megatron cuts the copies of a shared embedding alike: it gives each a bucket of its own
            shared = marks_of(held.parameter).is_tied_copy
            cuts[_name(block_map, held.parameter)] = ShardBoundaries(
                positions, held.group, has_replicas=shared, first_rank=held.start // held.shard
            )
    return cuts


def _splits(
    params: list[torch.Tensor], block_map: BlockMap, layout_of: Callable[[str], ParamLayout]
) -> dict[str, TensorParallelSplit]:
    """Row-parallel weights, whose slices make whole rows only together, and vectors of one segment that are sliced."""
    splits = {}
    for param in params:
        name, group = _name(block_map, param), slice_group(param)
        if group.size() > 1 and spans_slices(param, layout_of(name)):
            splits[name] = TensorParallelSplit(group, group.size())
    return splits
