"""Parameters that are DTensors, as PyTorch's FSDP2 (``fully_shard``) makes them: the ShardMap of their local shards."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..blocks.types import BlockError
from .shards import Cut, Fragment, ShardMap, even_cuts


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: of a DTensor its local shard, sharing memory; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dtensor_shards(tensors: Iterable[torch.Tensor], name_of: Callable[[torch.Tensor], str]) -> ShardMap | None:
    """The ShardMap of the DTensors among an optimizer's tensors; None where there are none.

    FSDP2 cuts dimension 0 of every parameter as torch.chunk does: ceil(rows / ranks) rows per rank, the last ranks
    fewer or none. A mesh with a replicated dimension besides (HSDP) changes nothing.

    Raises:
        BlockError: another placement (tensor parallelism, or a shard of another dimension).
    """
    found, cuts = [], {}
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            continue
        name = name_of(tensor)
        dimension = _sharded_dimension(tensor, name)
        start = 0
        if dimension is not None:
            row = tensor.numel() // max(tensor.shape[0], 1)
            chunk = -(-tensor.shape[0] // tensor.device_mesh.size(dimension)) * row
            start = tensor.device_mesh.get_local_rank(dimension) * chunk
            positions = even_cuts(tensor.numel(), chunk)
            if len(positions):
                cuts[name] = Cut(positions, tensor.device_mesh.get_group(dimension))
        numel = local(tensor).numel()
        found.append((tensor, [Fragment(name, start, numel, 0)] if numel else []))
    return ShardMap(found, cuts) if found else None


def _sharded_dimension(tensor: DTensor, name: str) -> int | None:
    """The mesh dimension over which dimension 0 is sharded."""
    dimensions = [number for number, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    plain = all(type(placement) is Shard and placement.dim == 0
                for placement in map(tensor.placements.__getitem__, dimensions))
    if len(dimensions) > 1 or not plain:
        raise BlockError(f"{name} is a DTensor placed {tensor.placements}; blockwise optimizers support parameters "
                         f"sharded once, in dimension 0 (fully_shard), and replicated otherwise")
    return dimensions[0] if dimensions else None
