"""ShardMaps of DeepSpeed's optimizers: which part of which parameter lies where in this rank's flat fp32 tensors."""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.pipe import PipelineModule

from ..blocks import BlockError
from ..optim import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit
from ..optim.base import BlockwiseOptimizer
from ..patches.upstream_deepspeed import PartitionedView, Stage3View, UnfusedView, view_of
from ..plan.shards import TensorParallelSlices, even_boundaries, fragments_within, slices_of, spans_slices


def shard_map(wrapper: Any, optimizer: BlockwiseOptimizer, module: torch.nn.Module, mpu: Any = None) -> ShardMap | None:
    """The ShardMap of what DeepSpeed made of our optimizer; None where it left the model's own parameters in it.

    Args:
        wrapper: ``engine.optimizer``.
        optimizer: ``engine.basic_optimizer``.
        module: ``engine.module``.
        mpu: ``engine.mpu``, where tensor parallelism is Megatron's.

    Raises:
        BlockError: a kind of wrapper this adapter does not know.
    """
    splits, slices = _splits(optimizer, module, mpu), _slices(optimizer, module, mpu)
    if wrapper is optimizer:
        return ShardMap(_whole(optimizer), {}, splits, slices=slices) if splits or slices else None
    shards = _flats_and_cuts(wrapper, optimizer, module)
    shards.splits, shards.slices = splits, slices
    return shards


def _flats_and_cuts(wrapper: Any, optimizer: BlockwiseOptimizer, module: torch.nn.Module) -> ShardMap:
    view = view_of(wrapper)
    if isinstance(view, Stage3View):
        return _stage3(view, optimizer)
    if isinstance(view, PartitionedView):
        return _partitioned(view, optimizer, module)
    if isinstance(view, UnfusedView):
        return _unsharded(view, optimizer)
    raise BlockError(
        f"DeepSpeed wrapped {type(optimizer).__name__} in {type(wrapper).__name__}, which blockwise_lr does "
        f"not know; use ZeRO stage 0 to 3, fp16 or bf16 without further optimizer features"
    )


def _name(optimizer: BlockwiseOptimizer, parameter: torch.Tensor) -> str:
    name = optimizer.block_map.name_of(parameter)
    if name is None:
        raise BlockError(f"DeepSpeed shards a parameter of shape {tuple(parameter.shape)} that is not in the module")
    return name


def _partitioned(view: PartitionedView, optimizer: BlockwiseOptimizer, module: torch.nn.Module) -> ShardMap:
    """ZeRO-1 and 2, and BF16_Optimizer: a group's parameters lie one after another in a buffer that is cut evenly."""
    found, cuts = [], {}
    for number, (parameters, flat, process_group) in enumerate(zip(view.groups, view.flats, view.process_groups)):
        size = flat.numel()
        begin = dist.get_rank(group=process_group) * size
        places, position = [], 0
        for parameter in parameters:
            name, numel = _name(optimizer, parameter), parameter.numel()
            start = position if view.offsets is None else view.offsets[number][id(parameter)]
            places.append((name, start, numel))
            cuts[name] = ShardBoundaries(even_boundaries(numel, size, start), process_group, first_rank=start // size)
            position += numel
        found.append((flat, fragments_within(places, begin, size)))
    if optimizer.segment_plans:
        _add_cuts_of_copies(cuts, optimizer, module)
    cut = {name: cut for name, cut in cuts.items() if len(cut.positions)}
    return ShardMap(found, cut, groups=list(view.process_groups))


def _add_cuts_of_copies(
    cuts: dict[str, ShardBoundaries], optimizer: BlockwiseOptimizer, module: torch.nn.Module
) -> None:
    """Tied weights of a PipelineModule: every stage that holds one takes over where the others' shards cut it."""
    tied = module.get_tied_weights_and_groups() if isinstance(module, PipelineModule) else ()
    for weight, stages in tied:
        mine = cuts.get(optimizer.block_map.name_of(weight) or "")
        everyone: list[Any] = [None] * dist.get_world_size(group=stages)
        dist.all_gather_object(everyone, () if mine is None else mine.positions, group=stages)
        if mine is not None:
            positions = np.unique(np.concatenate(everyone)).astype(np.int64)
            cuts[_name(optimizer, weight)] = ShardBoundaries(positions, mine.group, has_replicas=True)


def _stage3(view: Stage3View, optimizer: BlockwiseOptimizer) -> ShardMap:
    """ZeRO-3: every parameter is cut evenly over the ranks, and a rank's pieces are laid one after another."""
    found, cuts, groups = [], {}, []
    for pieces, flat in zip(view.pieces, view.flats):
        fragments = []
        groups.append(pieces[0].group if pieces else None)
        for piece in pieces:
            name = _name(optimizer, piece.parameter)
            start = dist.get_rank(group=piece.group) * piece.size
            held = min(piece.size, piece.numel - start)  # less than a shard, or none, where the padding is
            if held > 0:
                fragments.append(Fragment(name, start, held, piece.offset))
            positions = even_boundaries(piece.numel, piece.size)
            if len(positions):
                cuts[name] = ShardBoundaries(positions, piece.group)
        found.append((flat, fragments))
    return ShardMap(found, cuts, groups=groups)


def _unsharded(view: UnfusedView, optimizer: BlockwiseOptimizer) -> ShardMap:
    """fp16 or bf16 without ZeRO: an fp32 copy of every parameter."""
    return ShardMap([(fp32, [Fragment(_name(optimizer, fp16), 0, fp32.numel(), 0)]) for fp32, fp16 in view.pairs])


def _whole(optimizer: BlockwiseOptimizer) -> list[tuple[torch.Tensor, list[Fragment]]]:
    return [
        (p, [Fragment(_name(optimizer, p), 0, p.numel(), 0)])
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def _splits(optimizer: BlockwiseOptimizer, module: torch.nn.Module, mpu: Any) -> dict[str, TensorParallelSplit]:
    """Megatron's slices whose segments go on in other ranks' slices, by the marks Megatron puts on them."""
    group = _slice_group(mpu)
    if group is None:
        return {}
    return {
        name: TensorParallelSplit(group, dist.get_world_size(group=group))
        for name, p in module.named_parameters()
        if p.requires_grad and spans_slices(p, optimizer.layout_of(_name(optimizer, p)))
    }


def _slices(optimizer: BlockwiseOptimizer, module: torch.nn.Module, mpu: Any) -> dict[str, TensorParallelSlices]:
    """Megatron's slices, by the same marks."""
    group = _slice_group(mpu)
    if group is None:
        return {}
    named = ((_name(optimizer, p), p) for _, p in module.named_parameters() if p.requires_grad)
    return slices_of(named, lambda _: group)


def _slice_group(mpu: Any) -> Any:
    """The ranks that hold the slices of Megatron's parameters; None where these are whole."""
    if mpu is None or not hasattr(mpu, "get_tensor_model_parallel_group"):
        return None
    group = mpu.get_tensor_model_parallel_group()
    return None if dist.get_world_size(group=group) == 1 else group
