"""Parameters that a framework shards after the optimizer was built, and puts in the places of those it was built with.

Accelerate's ``prepare()`` does so under FSDP2: it takes model and optimizer together, calls ``fully_shard``, and leaves each
DTensor where the parameter was whose shards it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..blocks import BlockError, BlockMap
from ..blocks.block_map import full_shape

# per param group, the names of its parameters in their order
Places = Sequence[Sequence[str | None]]


def has_strangers(groups: Sequence[Mapping[str, Any]], places: Places, block_map: BlockMap) -> bool:
    """Whether a group begins with a DTensor that is not the one of its place; a look-up per group, so that each step can
    ask."""
    return any(
        isinstance(group["params"][0], DTensor) and list(names[:1]) != [block_map.name_of(group["params"][0])]
        for group, names in zip(groups, places)
        if group["params"]
    )


def replacements(groups: Sequence[Mapping[str, Any]], places: Places, block_map: BlockMap) -> list[tuple[str, DTensor]]:
    """The DTensors that the map does not know, each with the name of the parameter in whose place it is.

    Raises:
        BlockError: a group has another number of parameters than it was built with, or a DTensor another shape.
    """
    found = []
    for number, (group, names) in enumerate(zip(groups, places)):
        tensors: list[torch.Tensor] = group["params"]
        if len(tensors) != len(names):
            raise BlockError(
                f"param group {number} has {len(tensors)} parameters and was built with {len(names)}; build the optimizer "
                f"after the model is sharded"
            )
        for name, tensor in zip(names, tensors):
            if not isinstance(tensor, DTensor) or name is None or block_map.name_of(tensor) is not None:
                continue
            layout = block_map.get(name)
            if layout is not None and tuple(full_shape(tensor)) != layout.shape:
                raise BlockError(
                    f"in the place of {name}, of shape {layout.shape}, there is a DTensor of shape {tuple(tensor.shape)}; "
                    f"build the optimizer after the model is sharded"
                )
            found.append((name, tensor))
    return found
