"""BlockMaps of DeepSpeed's PipelineModule: every rank holds some layers, and all judge the whole together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.pipe.module import PipelineModule

from ..blocks import BlockError, BlockMap, UnmappedParameterError, map_blocks
from ..blocks.block_map import full_shape, plain_name
from ..blocks.rules import user_rules


def map_engine_module(module: torch.nn.Module, rules: Iterable[Any] | None, strict: bool) -> BlockMap:
    """``map_blocks`` of what DeepSpeed was given. For a PipelineModule it is collective over all ranks.

    Raises:
        BlockError: as map_blocks; for a PipelineModule the same on every rank, and a rule may match on any stage.
    """
    if not isinstance(module, PipelineModule):
        return map_blocks(module, rules=rules, strict=strict)
    own = user_rules(rules)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    here = [rule for rule in own if any(rule.matches(plain_name(name), full_shape(p)) for name, p in named)]
    block_map, error = None, None
    try:
        block_map = map_blocks(module, rules=here, strict=strict)
    except BlockError as found:
        error = (isinstance(found, UnmappedParameterError), str(found))
    answers: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(answers, (error, [rule.match for rule in here]))
    failed = next((answer for answer, _ in answers if answer is not None), None)
    if failed is not None:
        raise (UnmappedParameterError if failed[0] else BlockError)(failed[1])
    used = {match for _, matches in answers for match in matches}
    for rule in own:
        if rule.match not in used:
            raise BlockError(
                f"block rule {rule.match!r} matches no trainable parameter on any pipeline stage; correct it "
                f"or remove it"
            )
    assert block_map is not None, "a rank without a block map has an error, and errors are raised above"
    return block_map


def whole_model_map(block_map: BlockMap) -> BlockMap:
    """The block map of all pipeline stages together, equal on all ranks: what a checkpoint says of its model. Collective.

    Args:
        block_map: of this rank's stage.
    """
    stages: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(stages, list(block_map.values()))
    layouts = {layout.name: layout for stage in stages for layout in stage}  # tied weights are on several stages
    return BlockMap(layouts.values(), block_map.heads)
