"""DTensor parameters, as PyTorch's FSDP2 (``fully_shard``) makes them: their shard maps and their states' placements.

States of a DTensor parameter are DTensors too, so that torch.distributed.checkpoint knows which part each rank holds
and can reshard it. See :mod:`blockwise_lr.checkpoint.units` for Adam-mini's second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..blocks.types import BlockError
from .shards import Fragment, ShardBoundaries, ShardMap, even_boundaries


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def groups_of(tensors: Iterable[torch.Tensor]) -> list[dist.ProcessGroup]:
    """The process groups of the DTensors' device meshes; empty if no tensor is a DTensor."""
    groups: dict[dist.ProcessGroup, None] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            groups.update(dict.fromkeys(tensor.device_mesh.get_all_groups()))
    return list(groups)


def dtensor_shards(tensors: Iterable[torch.Tensor], name_of: Callable[[torch.Tensor], str]) -> ShardMap | None:
    """The ShardMap of the DTensors among an optimizer's tensors; None if there are none.

    FSDP2 shards dimension 0 of every parameter as torch.chunk does: ceil(rows / ranks) rows per rank, the last ranks
    fewer or none. A further replicated mesh dimension (HSDP) is supported.

    Args:
        tensors: the optimizer's tensors; those that are no DTensors are left out.
        name_of: the parameter name of a tensor.

    Raises:
        BlockError: a DTensor with another placement (tensor parallelism, or a shard of another dimension).
    """
    found, boundaries, groups = [], {}, []
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            continue
        name = name_of(tensor)
        dimension = sharded_dimension(tensor, name)
        numel = local(tensor).numel()
        if dimension is not None:
            positions = even_boundaries(tensor.numel(), chunk_numel(tensor, dimension))
            if len(positions):
                boundaries[name] = ShardBoundaries(positions, tensor.device_mesh.get_group(dimension))
        found.append((tensor, [Fragment(name, shard_start(tensor, dimension), numel, 0)] if numel else []))
        groups.append(None if dimension is None else tensor.device_mesh.get_group(dimension))
    return ShardMap(found, boundaries, groups=groups) if found else None


def chunk_numel(tensor: DTensor, dimension: int) -> int:
    """Elements of one rank's shard, over a mesh dimension, when the shard is full."""
    row = tensor.numel() // max(tensor.shape[0], 1)
    return -(-tensor.shape[0] // tensor.device_mesh.size(dimension)) * row


def shard_start(tensor: DTensor, dimension: int | None) -> int:
    """The first element of this rank's shard, counted in the whole tensor; 0 for a replicated tensor (None)."""
    return 0 if dimension is None else tensor.device_mesh.get_local_rank(dimension) * chunk_numel(tensor, dimension)


def sharded_dimension(tensor: DTensor, name: str) -> int | None:
    """The mesh dimension over which the tensor's dimension 0 is sharded; None if it is replicated.

    Raises:
        BlockError: the tensor is sharded twice, or in another dimension.
    """
    dimensions = [number for number, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    plain = all(
        type(placement) is Shard and placement.dim == 0 for placement in map(tensor.placements.__getitem__, dimensions)
    )
    if len(dimensions) > 1 or not plain:
        raise BlockError(
            f"{name} is a DTensor placed {tensor.placements}; blockwise optimizers support parameters "
            f"sharded once, in dimension 0 (fully_shard), and replicated otherwise"
        )
    return dimensions[0] if dimensions else None


def like(tensor: DTensor, values: torch.Tensor) -> DTensor:
    """This rank's values, as many as its shard has elements, as a DTensor of the tensor's shape and placements."""
    return DTensor.from_local(
        values.view(tensor.to_local().shape),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
