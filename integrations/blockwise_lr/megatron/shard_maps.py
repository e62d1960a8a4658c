"""ShardMaps of Megatron's optimizers: which part of which parameter each tensor of the inner optimizer is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from ..blocks import BlockError, BlockMap, ParamLayout
from ..blocks.marks import marks_of
from ..optim import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit
from ..plan.shards import even_boundaries, spans_slices
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
    """
    flats, params = [], []
    tensors = list(_tensors(wrapper))
    check_tensors(wrapper.optimizer, ((flat, param, numel) for flat, param, _, numel in tensors))
    for flat, param, start, _ in tensors:
        params.append(param)
        flats.append((flat, [Fragment(_name(block_map, param), start, flat.numel(), 0)]))
    cuts = _cuts(wrapper, block_map) if isinstance(wrapper, DistributedOptimizer) else {}
    return ShardMap(flats, cuts, _splits(params, block_map, wrapper.optimizer.layout_of) if row_parallel_sums else {})


def _tensors(wrapper: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """(the inner optimizer's tensor, the model parameter, where in it the tensor begins, how many elements it has)."""
    if isinstance(wrapper, DistributedOptimizer):
        for models, shards in (
            (wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
            (wrapper.model_float16_groups, wrapper.shard_fp32_from_float16_groups),
        ):
            for params, flats in zip(models, shards):
                for param, flat in zip(params, flats):
                    part = wrapper._get_model_param_range_map(param)["param"]
                    yield flat, param, part.start, part.size
    elif isinstance(wrapper, Float16OptimizerWithFloat16Params):
        for params, mains in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups):
            yield from ((main, param, 0, param.numel()) for param, main in zip(params, mains))
        yield from ((param, param, 0, param.numel()) for group in wrapper.fp32_from_fp32_groups for param in group)
    elif isinstance(wrapper, FP32Optimizer):
        yield from (
            (param, param, 0, param.numel()) for group in wrapper.optimizer.param_groups for param in group["params"]
        )
    else:
        raise BlockError(
            f"Megatron wrapped the optimizer in {type(wrapper).__name__}, which blockwise_lr does not know; "
            f"use the distributed optimizer or none"
        )


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
    for buffer in wrapper.buffers:
        ranks = buffer.data_parallel_group.size()
        for bucket in buffer.buckets:
            shard = bucket.grad_data.numel() // ranks
            for param in bucket.params_list:
                start, end, _ = buffer.param_index_map[param]
                positions = even_boundaries(end - start, shard, start - bucket.offset)
                if len(positions):
                    # Megatron cuts the copies of a shared embedding alike: it gives each a bucket of its own
                    shared = marks_of(param).is_tied_copy
                    cuts[_name(block_map, param)] = ShardBoundaries(
                        positions, buffer.data_parallel_group, has_replicas=shared
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
