"""ShardMaps of DeepSpeed's optimizers: which part of which parameter lies where in this rank's flat fp32 tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ..blocks import BlockError
from ..optim import Fragment, ShardBoundaries, ShardMap, TensorParallelSplit
from ..optim.base import BlockwiseOptimizer
from ..plan.shards import even_boundaries, spans_slices


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
    splits = _splits(optimizer, module, mpu)
    if wrapper is optimizer:
        return ShardMap(_whole(optimizer), {}, splits) if splits else None
    shards = _flats_and_cuts(wrapper, optimizer, module)
    shards.splits = splits
    return shards


def _flats_and_cuts(wrapper: Any, optimizer: BlockwiseOptimizer, module: torch.nn.Module) -> ShardMap:
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return _stage3(wrapper, optimizer)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        offsets = [
            dict(zip(map(id, group), starts))
            for group, starts in zip(wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets)
        ]
        return _partitioned(
            optimizer,
            module,
            wrapper.bit16_groups,
            wrapper.single_partition_of_fp32_groups,
            wrapper.real_dp_process_group,
            offsets,
        )
    if isinstance(wrapper, BF16_Optimizer):
        return _partitioned(
            optimizer,
            module,
            wrapper.bf16_groups,
            wrapper.fp32_groups_flat_partition,
            wrapper.real_dp_process_group,
            None,
        )
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        return _unsharded(wrapper, optimizer)
    raise BlockError(
        f"DeepSpeed wrapped {type(optimizer).__name__} in {type(wrapper).__name__}, which blockwise_lr does "
        f"not know; use ZeRO stage 0 to 3, fp16 or bf16 without further optimizer features"
    )


def _name(optimizer: BlockwiseOptimizer, parameter: torch.Tensor) -> str:
    name = optimizer.block_map.name_of(parameter)
    if name is None:
        raise BlockError(f"DeepSpeed shards a parameter of shape {tuple(parameter.shape)} that is not in the module")
    return name


def _partitioned(
    optimizer: BlockwiseOptimizer,
    module: torch.nn.Module,
    groups: Sequence[Sequence[torch.Tensor]],
    flats: Sequence[torch.Tensor],
    process_groups: Sequence[Any],
    offsets: Sequence[dict[int, int]] | None,
) -> ShardMap:
    """ZeRO-1 and 2, and BF16_Optimizer: a group's parameters lie one after another in a buffer that is cut evenly."""
    found, cuts = [], {}
    for number, (parameters, flat, process_group) in enumerate(zip(groups, flats, process_groups)):
        size = flat.numel()
        begin = dist.get_rank(group=process_group) * size
        fragments, position = [], 0
        for parameter in parameters:
            name, numel = _name(optimizer, parameter), parameter.numel()
            start = position if offsets is None else offsets[number][id(parameter)]
            low, high = max(start, begin), min(start + numel, begin + size)
            if low < high:
                fragments.append(Fragment(name, low - start, high - low, low - begin))
            cuts[name] = ShardBoundaries(even_boundaries(numel, size, start), process_group)
            position += numel
        found.append((flat, fragments))
    if optimizer.segment_plans:
        _add_cuts_of_copies(cuts, optimizer, module)
    return ShardMap(found, {name: cut for name, cut in cuts.items() if len(cut.positions)})


def _add_cuts_of_copies(
    cuts: dict[str, ShardBoundaries], optimizer: BlockwiseOptimizer, module: torch.nn.Module
) -> None:
    """Tied weights of a PipelineModule: every stage that holds one takes over where the others' shards cut it."""
    tied = module.get_tied_weights_and_groups() if isinstance(module, PipelineModule) else ()
    for weight, stages in tied:
        mine = cuts.get(optimizer.block_map.name_of(weight))
        everyone: list[Any] = [None] * dist.get_world_size(group=stages)
        dist.all_gather_object(everyone, () if mine is None else mine.positions, group=stages)
        if mine is not None:
            positions = np.unique(np.concatenate(everyone)).astype(np.int64)
            cuts[_name(optimizer, weight)] = ShardBoundaries(positions, mine.group, has_replicas=True)


def _stage3(wrapper: DeepSpeedZeroOptimizer_Stage3, optimizer: BlockwiseOptimizer) -> ShardMap:
    """ZeRO-3: every parameter is cut evenly over the ranks, and a rank's pieces are laid one after another."""
    found, cuts = [], {}
    for parameters, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat):
        fragments = []
        for parameter in parameters:
            name, shard = _name(optimizer, parameter), parameter.partition_numel()
            group = parameter.ds_process_group
            start = dist.get_rank(group=group) * shard
            _, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
            held = min(shard, parameter.ds_numel - start)  # less than a shard, or none, where the padding is
            if held > 0:
                fragments.append(Fragment(name, start, held, offset))
            positions = even_boundaries(parameter.ds_numel, shard)
            if len(positions):
                cuts[name] = ShardBoundaries(positions, group)
        found.append((flat, fragments))
    return ShardMap(found, cuts)


def _unsharded(wrapper: FP16_UnfusedOptimizer, optimizer: BlockwiseOptimizer) -> ShardMap:
    """fp16 or bf16 without ZeRO: an fp32 copy of every parameter."""
    pairs = (
        (fp32, fp16)
        for fp32s, fp16s in zip(wrapper.fp32_groups, wrapper.fp16_groups)
        for fp32, fp16 in zip(fp32s, fp16s)
    )
    return ShardMap([(fp32, [Fragment(_name(optimizer, fp16), 0, fp32.numel(), 0)]) for fp32, fp16 in pairs])


def _whole(optimizer: BlockwiseOptimizer) -> list[tuple[torch.Tensor, list[Fragment]]]:
    return [
        (p, [Fragment(_name(optimizer, p), 0, p.numel(), 0)])
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def _splits(optimizer: BlockwiseOptimizer, module: torch.nn.Module, mpu: Any) -> dict[str, TensorParallelSplit]:
    """Megatron's slices whose segments go on in other ranks' slices, by the marks Megatron puts on them."""
    if mpu is None or not hasattr(mpu, "get_tensor_model_parallel_group"):
        return {}
    group = mpu.get_tensor_model_parallel_group()
    if dist.get_world_size(group=group) == 1:
        return {}
    return {
        name: TensorParallelSplit(group, dist.get_world_size(group=group))
        for name, p in module.named_parameters()
        if p.requires_grad and spans_slices(p, optimizer.layout_of(optimizer.block_map.name_of(p)))
    }
