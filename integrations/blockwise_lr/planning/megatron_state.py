"""Bytes of parameters, gradients and optimizer states that a rank of Megatron holds, before anything is started.

Parameters and buffers are those of :mod:`.megatron_layout`; moments follow from the step plans that the optimizers use.
Gradients are float32, as ``--accumulate-allreduce-grads-in-fp32`` has them, which ``--bf16`` sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..blocks import BlockError, BlockMap, head_counts
from ..blocks.block_map import map_names
from ..plan.shards import Fragment
from ..plan.step_plan import segment_plan
from ..rules import RULES
from .megatron_layout import Buffer, MegatronLayout, Shapes, buffers_of, chunks_of
from .state import PRECISIONS, StateBytes

_FLOAT32 = 4
_HEAD = "output_layer.weight"


class MegatronStates:
    """What every rank of a model holds under a layout.

    Args:
        shapes: of the whole model, by Megatron's names, layers and experts numbered from 0.
        config: what says its numbers of heads (``num_attention_heads``, ``num_query_groups``).
        optimizer: a rule's name.
        precision: "bf16" or "fp32" of parameters; masters and moments are float32.

    Raises:
        BlockError: sizes that do not divide, an unknown optimizer or precision, or names that are not Megatron's.
    """

    def __init__(
        self,
        shapes: Shapes,
        config: Mapping[str, Any],
        layout: MegatronLayout,
        *,
        optimizer: str = "adamw",
        precision: str = "bf16",
    ) -> None:
        if optimizer not in RULES:
            raise BlockError(f"the optimizer is {optimizer!r}; use one of {', '.join(RULES)}")
        if precision not in PRECISIONS:
            raise BlockError(f"the precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
        if "embedding.word_embeddings.weight" not in shapes:
            raise BlockError("the model is not one of Megatron's names; give a Megatron argument file")
        self.shapes, self.config, self.layout, self.precision = shapes, dict(config), layout, precision
        self.rule = RULES[optimizer]
        self._is_tied = _HEAD not in shapes and layout.pipeline * layout.virtual > 1
        self._stages: dict[int, tuple[BlockMap, list[Buffer]]] = {}

    def of_rank(self, stage: int, data: int = 0) -> StateBytes:
        """Of a rank: its pipeline stage, and its place among those that share its dense parameters.

        Ranks that differ in their tensor-parallel place alone hold as many bytes, unless experts are sliced less: then this is
        the first of them. Megatron numbers ranks by tensor, expert and data parallelism, in this order.
        """
        if not 0 <= stage < self.layout.pipeline or not 0 <= data < self.layout.data:
            raise BlockError(f"there is no stage {stage} with data-parallel rank {data} in {self.layout}")
        layouts, buffers = self._stage(stage)
        width = PRECISIONS[self.precision]
        whole = sum(buffer.numel for buffer in buffers)
        held = moments = 0
        of_experts = self.layout.tensor * data // (self.layout.expert * self.layout.of_expert)
        for buffer in buffers:
            for fragment in self.fragments(buffer, of_experts if buffer.is_of_experts else data):
                held += fragment.numel
                moments += self._moments(fragment, layouts)
        has_masters = self.precision == "bf16"
        return StateBytes(width * whole, _FLOAT32 * whole, _FLOAT32 * held if has_masters else 0, _FLOAT32 * moments)

    def fragments(self, buffer: Buffer, rank: int) -> Iterator[Fragment]:
        """The parts of parameters that a rank steps, each a tensor of its own."""
        for place in buffer.places:
            if not self.layout.distributed:
                yield Fragment(place.name, 0, place.numel, 0)
                continue
            shard = place.bucket // buffer.ranks
            low = max(place.start, rank * shard)
            high = min(place.start + place.numel, (rank + 1) * shard)
            if low < high:
                yield Fragment(place.name, low - place.start, high - low, 0)

    def buffers(self, stage: int) -> list[Buffer]:
        """The gradient buffers of a stage's ranks."""
        return self._stage(stage)[1]

    def layouts(self, stage: int) -> BlockMap:
        """The block map of a stage's slices."""
        return self._stage(stage)[0]

    def largest(self) -> StateBytes:
        """What the rank with the most holds: of the first, a middle and the last stage, and up to 16 data-parallel ranks of
        each (all stages and ranks where they are no more)."""
        stages = {0, min(1, self.layout.pipeline - 1), self.layout.pipeline - 1}
        places = {round(i * (self.layout.data - 1) / 15) for i in range(16)}
        return max((self.of_rank(stage, data) for stage in stages for data in places), key=lambda one: one.total)

    def _stage(self, stage: int) -> tuple[BlockMap, list[Buffer]]:
        if stage not in self._stages:
            chunks = chunks_of(self.shapes, self.layout, stage)
            buffers = [buffer for chunk in chunks for buffer in buffers_of(chunk, self.layout, self._is_tied)]
            shapes = {name: shape for chunk in chunks for name, shape in chunk.items()}
            heads = head_counts({**self.config, "tensor_model_parallel_size": self.layout.tensor})
            copies = [_HEAD] if self._is_tied else []
            self._stages[stage] = map_names(shapes, heads=heads, family="megatron", copies=copies), buffers
        return self._stages[stage]

    def _moments(self, fragment: Fragment, layouts: BlockMap) -> int:
        found = fragment.numel * len(self.rule.element_states)
        if self.rule.segment_state is not None:
            layout = self.rule.segments(layouts[fragment.name], "element")
            found += segment_plan(fragment.numel, [fragment], [layout]).slots
        return found
