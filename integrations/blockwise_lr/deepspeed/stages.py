"""BlockMaps of DeepSpeed's PipelineModule: every rank holds some layers, and all judge the whole together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.pipe.module import PipelineModule

from ..blocks import BlockError, BlockMap, UnmappedParameterError, map_blocks
from ..blocks.user_rules import user_rules


def map_engine_module(module: torch.nn.Module, rules: Iterable[Any] | None, strict: bool) -> BlockMap:
    """``map_blocks`` of what DeepSpeed was given. For a PipelineModule it is collective over all ranks.

    Raises:
        BlockError: as map_blocks; for a PipelineModule the same on every rank, and a rule may match on any stage.
    """
    if not isinstance(module, PipelineModule):
        return map_blocks(module, rules=rules, strict=strict)
    own = user_rules(rules)
    block_map, error = None, None
    try:
        block_map = map_blocks(module, rules=own, strict=strict, elsewhere=_names_of_all_stages(module))
    except BlockError as found:
        error = (isinstance(found, UnmappedParameterError), str(found))
    answers: list[Any] = [None] * dist.get_world_size()
    unused = () if block_map is None else tuple(own.index(rule) for rule in block_map.unused_rules)
    torch.distributed.all_gather_object(answers, (error, unused))
    failed = next((answer for answer, _ in answers if answer is not None), None)
    if failed is not None:
        raise (UnmappedParameterError if failed[0] else BlockError)(failed[1])
    for number in set.intersection(*(set(numbers) for _, numbers in answers)):
        raise BlockError(
            f"block rule {own[number].match!r} matches no trainable parameter on any pipeline stage, or only those of a rule "
            f"before it; correct it or remove it"
        )
    assert block_map is not None, "a rank without a block map has an error, and errors are raised above"
    return block_map


def _names_of_all_stages(module: PipelineModule) -> list[str]:
    """Of the parameters, which a pipeline numbers by their layers over all stages. Collective."""
    stages: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(stages, [name for name, _ in module.named_parameters()])
    return list(dict.fromkeys(name for stage in stages for name in stage))


def whole_model_map(block_map: BlockMap) -> BlockMap:
    """The block map of all pipeline stages together, equal on all ranks: what a checkpoint says of its model. Collective.

    Args:
        block_map: of this rank's stage.
    """
    stages: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(stages, list(block_map.values()))
    layouts = {layout.name: layout for stage in stages for layout in stage}  # tied weights are on several stages
    return BlockMap(layouts.values(), block_map.heads, own_blocks=block_map.own_blocks)
