"""BlockMaps of Megatron models: layers numbered over all pipeline stages, errors the same on every rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..blocks import BlockMap, head_counts, map_names
from ..blocks.block_map import plain_name
from ..blocks.dims import config_values
from ..blocks.marks import marks_of

_LAYER = re.compile(r"(.*\blayers)\.\d+$")
# the number of an expert in a parameter's name
EXPERT = re.compile(
    r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+\Z|(?<=\.experts\.linear_fc[12]\.bias)\d+\Z"
)
_VOCABULARY = re.compile(r"\b(?:word_embeddings|output_layer)\.(?:weight|bias)\Z")


@dataclass(frozen=True)
class ChunkMaps:
    """BlockMaps of a Megatron model.

    Attributes:
        ours: this rank's model chunks, their parameters bound.
        stages: all pipeline stages, each parameter as this rank's tensor-parallel slice.
        recorded: what a checkpoint says of the model, the same under any parallelism: see :func:`_recorded`.
    """

    ours: BlockMap
    stages: BlockMap
    recorded: BlockMap


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
            yield plain_name(numbers.get(prefix, "") + name[len(prefix) :]), p


def map_chunks(
    chunks: Sequence[torch.nn.Module],
    *,
    rules: Iterable[Any] = (),
    strict: bool = True,
    pipeline: dist.ProcessGroup | None = None,
) -> ChunkMaps:
    """The BlockMaps of this rank's model chunks, of all pipeline stages, and of the model without its parallelism.

    Collective over the pipeline group: an unmapped parameter or a rule that matches nothing is judged on all stages
    together, so that every rank raises the same error or none does.

    Args:
        chunks: this rank's model chunks, wrapped in DDP and Float16Module or not.
        rules, strict: as for :func:`blockwise_lr.map_blocks`.
        pipeline: the group of stages; Megatron's own by default.
    """
    named = [pair for chunk in chunks for pair in global_names(chunk)]
    here = {name: (tuple(p.shape), _whole_shape(p), marks_of(p).is_tied_copy) for name, p in named}
    group = pipeline or parallel_state.get_pipeline_model_parallel_group()
    found: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(found, here, group=group)
    everywhere = {name: value for stage in found for name, value in stage.items()} | here
    config = config_values(get_model_config(chunks[0]))
    copies = [name for name, (_, _, is_copy) in everywhere.items() if is_copy]
    arguments: dict[str, Any] = dict(rules=rules, strict=strict, family="megatron", copies=copies)
    stages = map_names(
        {name: shape for name, (shape, _, _) in everywhere.items()}, heads=head_counts(config), **arguments
    )
    mine = (stages[name] for name in here)
    ours = BlockMap(mine, stages.heads, stages.unmapped & here.keys(), own_blocks=stages.own_blocks)
    ours.bind(named)
    undivided = head_counts({**config, "tensor_model_parallel_size": 1})
    whole = map_names({name: shape for name, (_, shape, _) in everywhere.items()}, heads=undivided, **arguments)
    return ChunkMaps(ours, stages, _recorded(whole, copies))


def slice_group(param: torch.Tensor) -> dist.ProcessGroup:
    """The ranks that hold the slices of a tensor-parallel parameter."""
    return (
        parallel_state.get_tensor_model_parallel_group()
        if getattr(param, "allreduce", True)
        else parallel_state.get_expert_tensor_parallel_group()
    )


def _whole_shape(param: torch.Tensor) -> tuple[int, ...]:
    """A parameter's shape without tensor parallelism."""
    shape = list(param.shape)
    axis = marks_of(param).split_axis
    if axis is not None:
        shape[max(axis, 0)] *= slice_group(param).size()  # where the axis is not stated, along their rows
    return tuple(shape)


def _recorded(whole: BlockMap, copies: Iterable[str]) -> BlockMap:
    """A map that tells nothing of the parallelism it was made under.

    Left out are the tied embedding's copies on other stages, experts beyond the first, of which every expert-parallel rank
    has its own, and the size of the vocabulary, which Megatron pads to a multiple that depends on the number of ranks.
    """
    layouts = {}
    for name in whole.keys() - {name for name in copies if not name.endswith("word_embeddings.weight")}:
        layout, name = whole[name], EXPERT.sub("0", name)
        if _VOCABULARY.search(name):
            layout = replace(layout, shape=(1, *layout.shape[1:]), pieces=(replace(layout.pieces[0], size=1),))
        if layout.batch_dims:  # experts stacked in one parameter
            layout = replace(layout, shape=(1, *layout.shape[1:]))
        layouts[name] = replace(layout, name=name)
    return BlockMap((layouts[name] for name in sorted(layouts)), whole.heads, own_blocks=whole.own_blocks)
