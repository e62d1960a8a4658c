"""What of a GPT model a rank of Megatron holds: pipeline stages, tensor-parallel slices, experts, and gradient buffers.

Megatron's conventions, of megatron-core 0.15 to 0.19: layers are dealt evenly to stages (and in turns to virtual ones), the
last stage has a copy of a tied embedding, and gradients lie in buffers in the reverse order of the parameters. With the
distributed optimizer each parameter of a buffer begins at a multiple of 64 elements, a tied embedding has a bucket of its
own, and a bucket ends at a multiple of 128 and of the ranks that share it, who cut it evenly.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..blocks import BlockError

_WORDS, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")
_EXPERT = re.compile(
    r"\.experts\.(?:local_experts\.(\d+)\.linear_fc[12]\.(?:weight|bias)|linear_fc[12]\.(?:weight|bias)(\d+))$"
)
_COLUMN = re.compile(
    r"(?:linear_qkv|linear_fc1)\.(?:weight|bias)\d*$|^(?:embedding\.word_embeddings|output_layer)\.weight$"
)
_ROW = re.compile(r"(?:linear_proj|linear_fc2)\.weight\d*$")
# Megatron builds these parts of a layer in this order, whatever order they are described in
_ORDER = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention",
    "mlp.router",
    "mlp.experts",
    "mlp",
)
_PARAMETER_START, _BUCKET_END = 64, 128

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MegatronLayout:
    """How a model is spread over ranks.

    Attributes:
        tensor, pipeline, expert: sizes of the parallelisms.
        data: ranks that share a buffer of dense parameters: data parallel times context parallel.
        virtual: model chunks of each pipeline stage.
        expert_tensor: slices of an expert; None: as ``tensor``.
        distributed: Megatron's distributed optimizer.
        vocabulary_multiple: the embedding's rows are padded to a multiple of this times ``tensor``.
        embedding_as_layer, loss_as_layer: either counts as a layer when layers are dealt to stages.

    Raises:
        BlockError: a size below 1, or sizes of experts that do not divide the ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    virtual: int = 1
    expert_tensor: int | None = None
    distributed: bool = True
    vocabulary_multiple: int = 128
    embedding_as_layer: bool = False
    loss_as_layer: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, bool) and value < 1:
                raise BlockError(f"{name.replace('_', ' ')} parallel size is {value}; give at least 1")
        if self.tensor * self.data % (self.expert * self.of_expert):
            raise BlockError(
                f"{self.expert} expert-parallel ranks of {self.of_expert} slices do not divide the {self.tensor * self.data} "
                f"ranks of a pipeline stage; use a smaller expert-parallel size"
            )

    @property
    def of_expert(self) -> int:
        """Slices of an expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def expert_data(self) -> int:
        """Ranks that share a buffer of experts."""
        return self.tensor * self.data // (self.expert * self.of_expert)

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "virtual PP": self.virtual, "EP": self.expert, "DP": self.data}
        shown = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "DP")
        return shown + (", distributed optimizer" if self.distributed else "")


_FLAGS = {
    "tensor": "--tensor-model-parallel-size",
    "pipeline": "--pipeline-model-parallel-size",
    "expert": "--expert-model-parallel-size",
    "expert_tensor": "--expert-tensor-parallel-size",
    "virtual": "--num-virtual-stages-per-pipeline-rank",
    "vocabulary_multiple": "--make-vocab-size-divisible-by",
}


def flags_of(words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What Megatron's flags say of a :class:`MegatronLayout`, and the precision, "bf16" (also of ``--fp16``) or "fp32"."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, flag in _FLAGS.items():
        parser.add_argument(flag, dest=name, type=int, default=argparse.SUPPRESS)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--num-layers-per-virtual-pipeline-stage", type=int)
    parser.add_argument("--padded-vocab-size", type=int)
    parser.add_argument("--use-distributed-optimizer", action="store_true", dest="distributed")
    for part in ("embedding", "loss"):
        flag = f"--account-for-{part}-in-pipeline-split"
        parser.add_argument(flag, action="store_true", dest=f"{part}_as_layer")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    said = vars(parser.parse_known_args(list(words))[0])
    layers, each = said.pop("num_layers"), said.pop("num_layers_per_virtual_pipeline_stage")
    if layers and each:
        said["virtual"] = max(layers // (each * said.get("pipeline", 1)), 1)
    if said.pop("padded_vocab_size"):
        said["vocabulary_multiple"] = 1
    is_half = bool(said.pop("bf16")) | bool(said.pop("fp16"))
    return said, "bf16" if is_half else "fp32"


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a buffer.

    Attributes:
        start: its first element, counted from its bucket's.
        bucket: elements of the bucket.
    """

    name: str
    start: int
    numel: int
    bucket: int


@dataclass(frozen=True)
class Buffer:
    """A gradient buffer of a model chunk.

    Attributes:
        ranks: that share it.
        numel: elements, padding among them.
        is_of_experts: whether expert-parallel ranks hold others.
    """

    places: tuple[Place, ...]
    ranks: int
    numel: int
    is_of_experts: bool


def chunks_of(shapes: Shapes, layout: MegatronLayout, stage: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of a stage's model chunks on one tensor- and expert-parallel rank, in Megatron's order.

    Args:
        shapes: of the whole model, by Megatron's names with layers and experts numbered from 0.

    Raises:
        BlockError: layers, experts or dimensions that do not divide.
    """
    count = 1 + max((int(found[2]) for name in shapes if (found := _LAYER.match(name))), default=-1)
    parts = layout.pipeline * layout.virtual
    before, slots = int(layout.embedding_as_layer), count + layout.embedding_as_layer + layout.loss_as_layer
    if slots % parts:
        raise BlockError(f"{slots} layers do not divide over {parts} pipeline stages; use sizes that divide them")
    size, chunks = slots // parts, []
    for virtual in range(layout.virtual):
        number = virtual * layout.pipeline + stage
        layers = range(number * size - before, (number + 1) * size - before)
        held = {
            name: _slice(name, shape, layout)
            for name, shape in _in_order(shapes)
            if _is_here(name, layers, number, parts) and _is_first_experts(name, shapes, layout)
        }
        if number == parts - 1 and parts > 1 and _HEAD not in shapes:  # the copy of a tied embedding
            held[_HEAD] = _slice(_WORDS, shapes[_WORDS], layout)
        chunks.append(held)
    return chunks


def buffers_of(chunk: Shapes, layout: MegatronLayout, is_tied: bool) -> list[Buffer]:
    """The gradient buffers of a chunk: dense parameters, and with expert parallelism the experts.

    Args:
        is_tied: the embedding's two copies lie on different stages.
    """
    experts = {name for name in chunk if layout.expert > 1 and _EXPERT.search(name)}
    dense = [(name, math.prod(shape)) for name, shape in chunk.items() if name not in experts]
    expert = [(name, math.prod(shape)) for name, shape in chunk.items() if name in experts]
    own = {_WORDS, _HEAD} if is_tied else set()
    kinds = ((dense, layout.data, False), (expert, layout.expert_data, True))
    return [_buffer(named, ranks, own, layout.distributed, of_experts) for named, ranks, of_experts in kinds if named]


def _buffer(
    named: Iterable[tuple[str, int]], ranks: int, own: set[str], is_distributed: bool, of_experts: bool
) -> Buffer:
    start_at, end_at = (_PARAMETER_START, math.lcm(ranks, _BUCKET_END)) if is_distributed else (1, 1)
    buckets: list[tuple[list[tuple[str, int, int]], int]] = []
    inside: list[tuple[str, int, int]] = []
    end = 0
    for name, numel in reversed(list(named)):
        alone = is_distributed and name in own
        start = _up(end, start_at)
        if alone and inside:
            buckets.append((inside, _up(start, end_at)))
            inside, start = [], 0
        inside.append((name, start, numel))
        end = start + numel
        if alone:
            buckets.append((inside, _up(end, end_at)))
            inside, end = [], 0
    if inside:
        buckets.append((inside, _up(end, end_at)))
    places = [Place(name, start, numel, size) for held, size in buckets for name, start, numel in held]
    return Buffer(tuple(places), ranks, sum(size for _, size in buckets), of_experts)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _in_order(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]]:
    """The order in which Megatron's modules register them."""
    places: dict[str, int] = {}
    for name in shapes:  # parts of a layer stay where the first of them is
        places.setdefault(_part(name), len(places))
    return sorted(shapes.items(), key=lambda item: (places[_part(item[0])], _rank(item[0])))


def _part(name: str) -> str:
    found = _LAYER.match(name)
    return name if found is None else f"{found[1]}.{found[2]}.{found[3].partition('.')[0]}"


def _rank(name: str) -> int:
    found = _LAYER.match(name)
    rest = "" if found is None else found[3]
    return next((number for number, part in enumerate(_ORDER) if rest.startswith(part)), len(_ORDER))


def _is_here(name: str, layers: range, number: int, parts: int) -> bool:
    found = _LAYER.match(name)
    if found:
        return int(found[2]) in layers
    return number == 0 if name.startswith("embedding.") else number == parts - 1


def _is_first_experts(name: str, shapes: Shapes, layout: MegatronLayout) -> bool:
    """Whether an expert is one of the first expert-parallel rank's; all ranks hold as many, of equal shapes."""
    found = _EXPERT.search(name)
    if found is None or layout.expert == 1:
        return True
    experts = 1 + max(int(one[1] or one[2]) for other in shapes if (one := _EXPERT.search(other)))
    if experts % layout.expert:
        raise BlockError(
            f"{experts} experts do not divide over {layout.expert} expert-parallel ranks; use a size that divides"
        )
    return int(found[1] or found[2]) < experts // layout.expert


def _slice(name: str, shape: tuple[int, ...], layout: MegatronLayout) -> tuple[int, ...]:
    parts = layout.of_expert if _EXPERT.search(name) else layout.tensor
    if name in (_WORDS, _HEAD):
        shape = (_up(shape[0], layout.vocabulary_multiple * layout.tensor), *shape[1:])
    axis = 0 if _COLUMN.search(name) else 1 if _ROW.search(name) else None
    if axis is None or parts == 1:
        return shape
    if shape[axis] % parts:
        raise BlockError(
            f"{name} of shape {shape} does not divide over {parts} tensor-parallel ranks; use a size that divides"
        )
    return tuple(size // parts if place == axis else size for place, size in enumerate(shape))
