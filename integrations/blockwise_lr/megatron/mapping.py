"""BlockMaps of Megatron models: layers numbered over all pipeline stages, errors the same on every rank."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..blocks import BlockMap, head_counts, map_names
from ..blocks.block_map import plain_name
from ..blocks.dims import config_values

_LAYER = re.compile(r"(.*\blayers)\.\d+$")


def global_names(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter) of a model chunk's trainable parameters, layers numbered over all stages from 0.

    Megatron numbers the layers of each pipeline stage and virtual stage from 0 again; a layer's own ``layer_number``
    counts them all, from 1.
    """
    numbers = {}
    for prefix, module in chunk.named_modules():
        found = _LAYER.match(prefix)
        if found and isinstance(getattr(module, "layer_number", None), int):
            numbers[prefix + "."] = f"{found.group(1)}.{module.layer_number - 1}."
    for name, p in chunk.named_parameters():
        if p.requires_grad:
            prefix = next((prefix for prefix in numbers if name.startswith(prefix)), "")
            yield plain_name(numbers.get(prefix, "") + name[len(prefix):]), p


def map_chunks(chunks: Sequence[torch.nn.Module], *, rules: Iterable[Any] = (), strict: bool = True,
               pipeline: dist.ProcessGroup | None = None) -> tuple[BlockMap, BlockMap]:
    """The BlockMap of this rank's model chunks, and that of all pipeline stages.

    Collective over the pipeline group: an unmapped parameter or a rule that matches nothing is judged on all stages
    together, so that every rank raises the same error or none does.

    Args:
        chunks: this rank's model chunks, wrapped in DDP and Float16Module or not.
        rules, strict: as for :func:`blockwise_lr.map_blocks`.
        pipeline: the group of stages; Megatron's own by default.
    """
    named = [pair for chunk in chunks for pair in global_names(chunk)]
    here = {name: (tuple(p.shape), bool(getattr(p, "shared_embedding", False))) for name, p in named}
    group = pipeline or parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(stages, here, group=group)
    everywhere = {name: value for stage in stages for name, value in stage.items()} | here
    heads = head_counts({**config_values(get_model_config(chunks[0])),
                         "tensor_model_parallel_rank": parallel_state.get_tensor_model_parallel_rank()})
    whole = map_names({name: shape for name, (shape, _) in everywhere.items()}, rules=rules, strict=strict,
                      heads=heads, family="megatron",
                      copies=[name for name, (_, is_copy) in everywhere.items() if is_copy])
    ours = BlockMap((whole[name] for name in here), whole.heads, whole.unmapped & here.keys())
    ours.bind(named)
    return ours, whole
