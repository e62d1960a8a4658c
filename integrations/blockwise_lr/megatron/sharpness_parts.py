"""What each rank of a Megatron model computes and counts of a draw of the sharpness.

Each rank squares the gradients of the slices it has. What several tensor-parallel ranks have copies of counts once, and what
they have parts of the gradient of (norms under sequence parallelism) is added up before it is squared; under context or
expert parallelism all gradients are, over the data-parallel ranks that have copies. Only the last pipeline stage draws
labels, the same on all tensor-parallel ranks, and an embedding that the first and the last stage share counts once, with the
gradient of both uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..blocks import BlockMap, BlockType
from ..blocks.marks import marks_of
from ..measure.gradients import Gradients
from ..measure.labels import drawn_labels, logit_gradient, probabilities
from ..measure.parts import BlockParts
from ..measure.sharpness import Squares
from .mapping import EXPERT, slice_group

Forward = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
Key = tuple[str, BlockType]


def context_positions(length: int, device: torch.device | None = None) -> torch.Tensor:
    """The positions of whole sequences that this rank of context parallelism has: two pieces, one from each end."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    pieces = torch.arange(length, device=device).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def every_expert(stages: BlockMap) -> list[Key]:
    """The parameters and block types of the whole model, experts numbered over all expert-parallel ranks; in one order."""
    local, ranks = _local_experts(stages), range(parallel_state.get_expert_model_parallel_world_size())
    keys: dict[Key, None] = {}
    for name in sorted(stages):
        names = [_of_rank(name, rank * local) for rank in ranks] if EXPERT.search(name) else [name]
        keys.update({(each, block): None for each in names for block in stages[name].block_numel()})
    return list(keys)


def _local_experts(names: Iterable[str]) -> int:
    """How many experts a rank holds in each layer."""
    return max((int(found[0]) + 1 for found in map(EXPERT.search, names) if found), default=0)


def _of_rank(name: str, before: int) -> str:
    """An expert's name, numbered over all ranks, of which those before this one hold so many."""
    return EXPERT.sub(lambda found: str(before + int(found[0])), name)


class Chunk:
    """A chunk of the model on this rank, and the squares of its gradients that this rank counts.

    Args:
        model: the chunk, without wrappers.
        block_map: of all of this rank's chunks.
        together: a draw is of all data-parallel ranks.
    """

    def __init__(self, model: Any, block_map: BlockMap, together: bool) -> None:
        self.model, self.config, self._together = model, get_model_config(model), together
        self.first, self.last = bool(model.pre_process), bool(model.post_process)
        self.parts = BlockParts(model, block_map, slices=True)
        self.named = dict(self.parts.named)
        self.known = self._known(block_map)
        self.sums = Squares(self.parts)
        self.gradients = Gradients(model, set(self.named), self._take)
        self._shared = {
            name for name, p in self.named.items() if marks_of(p).is_tied_copy and not (self.first and self.last)
        }
        self._partial = {name for name, p in self.named.items() if self._is_partial(name, p)}
        self._added = {name: groups for name in sorted(self.named) if (groups := self._groups(name))}
        self._kept: dict[str, torch.Tensor] = {}

    def _known(self, block_map: BlockMap) -> dict[str, str]:
        """This chunk's names -> those of the whole model."""
        known = {name: block_map.require_name(p) for name, p in self.named.items()}
        before = _local_experts(known.values()) * parallel_state.get_expert_model_parallel_rank()
        return {name: _of_rank(whole, before) for name, whole in known.items()}

    def _copies(self, p: torch.Tensor) -> dist.ProcessGroup:
        """The data-parallel ranks that have copies of it, those of context parallelism among them."""
        if getattr(p, "allreduce", True):
            return parallel_state.get_data_parallel_group(with_context_parallel=True)
        return parallel_state.get_expert_data_parallel_group()

    def _groups(self, name: str) -> list[dist.ProcessGroup]:
        """Over which ranks the gradient of a parameter is added up before it is squared."""
        p = self.named[name]
        groups = [self._copies(p)] if self._together else []
        if name in self._partial:
            groups.append(slice_group(p))
        groups = [group for group in groups if group.size() > 1]
        return groups + ([parallel_state.get_embedding_group()] if name in self._shared else [])

    def _is_partial(self, name: str, p: torch.Tensor) -> bool:
        """As finalize_model_grads of Megatron: copies whose gradient each tensor-parallel rank has a part of."""
        marked = self.config.sequence_parallel and getattr(p, "sequence_parallel", False)
        of_heads = self.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        return bool(marked or of_heads) and marks_of(p).split_axis is None

    def _counts(self, name: str) -> bool:
        """Whether this rank is the one that counts what it has of a parameter."""
        p = self.named[name]
        if (name in self._shared and not self.first) or (self._together and self._copies(p).rank() > 0):
            return False
        return marks_of(p).split_axis is not None or slice_group(p).rank() == 0

    def numel(self) -> dict[Key, int]:
        """Elements that this rank counts."""
        return {
            (self.known[name], block): self.parts.numel(name, block)
            for name, block in self.sums.keys
            if self._counts(name)
        }

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        if name in self._added:
            self._kept[name] = gradient.float().clone()
        else:
            self.sums.take(name, gradient)

    def drawn(self, tokens: int) -> dict[Key, float]:
        """Predicted tokens x the squares that this rank counts, of one backward pass. Collective."""
        kept, self._kept = self._kept, {}
        for name, groups in self._added.items():
            gradient = kept.pop(name, None)
            if gradient is None:
                gradient = torch.zeros_like(self.named[name], dtype=torch.float32)
            for group in groups:
                dist.all_reduce(gradient, group=group)
            if name in self._partial and getattr(self.named[name], "average_gradients_across_tp_domain", False):
                gradient /= parallel_state.get_tensor_model_parallel_world_size()
            self.sums.take(name, gradient)
        found = zip(self.sums.keys, self.sums.drawn())
        return {(self.known[name], of): tokens * square for (name, of), square in found if self._counts(name)}


class Pipeline:
    """This rank's chunks, run one after the other between those of the other stages.

    Args:
        chunks: in the order of the virtual stages.
        forward: calls a chunk with whole token ids.
        together: a draw is of all data-parallel ranks.
    """

    def __init__(self, chunks: Sequence[Chunk], forward: Forward, together: bool) -> None:
        self.chunks, self.forward = chunks, forward
        self.config = chunks[0].config
        self.replicas = parallel_state.get_data_parallel_world_size() if together else 1
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.before = parallel_state.get_pipeline_model_parallel_prev_rank()
        self.after = parallel_state.get_pipeline_model_parallel_next_rank()
        slices = parallel_state.get_tensor_model_parallel_group()
        self.slices = slices if slices.size() > 1 else None

    def numel(self) -> dict[Key, int]:
        """Elements that this rank counts."""
        return {key: count for chunk in self.chunks for key, count in chunk.numel().items()}

    def squares(self, ids: torch.Tensor, draws: int, seed: int) -> Iterator[dict[Key, float]]:
        """Predicted tokens x the squares that this rank counts, for each draw. Collective over the ranks of a draw."""
        with torch.enable_grad(), ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.gradients.watching())
            passes = [self._forward(chunk, ids) for chunk in self.chunks]
            drawn = self._labels(passes[-1][1], ids, draws, seed) if self.chunks[-1].last else None
            for draw in range(draws):
                for chunk, (entered, output) in zip(reversed(self.chunks), reversed(passes)):
                    gradient = drawn(draw) if drawn and chunk.last else self._receive_gradient(output)
                    back = chunk.gradients.backward(output, gradient, keep=draw + 1 < draws, entered=entered)
                    if back is not None:
                        self._send(back, self.before)
                tokens = self.replicas * ids[:, 1:].numel()
                yield {key: value for chunk in self.chunks for key, value in chunk.drawn(tokens).items()}
        for chunk, (entered, _) in zip(self.chunks, passes):
            if entered is not None:
                chunk.model.set_input_tensor(None)

    def _forward(self, chunk: Chunk, ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What a chunk was given by the one before, and what it makes of it."""
        entered = None if chunk.first else self._receive(chunk, ids)
        if entered is not None:
            chunk.model.set_input_tensor(entered)
        output = self.forward(chunk.model, ids)
        if not chunk.last:
            self._send(output.detach(), self.after)
        return entered, output

    def _labels(self, output: torch.Tensor, ids: torch.Tensor, draws: int, seed: int) -> Callable[[int], torch.Tensor]:
        """Draw -> the gradient of the mean loss, over all ranks of a draw, with labels drawn from the logits."""
        sequences, length = ids.shape
        mine = context_positions(length, ids.device)
        mine = mine.expand(sequences, -1) + length * torch.arange(sequences, device=ids.device)[:, None]
        counts = mine % length < length - 1  # the last position predicts nothing
        p = probabilities(output[counts], self.slices)
        rows = mine[counts] - mine[counts] // length
        every = sequences * (length - 1)
        labels = drawn_labels(p, draws, seed, self.slices, rows=rows, of=every)

        def of_draw(draw: int) -> torch.Tensor:
            gradient = torch.zeros_like(output)
            gradient[counts] = logit_gradient(p, labels[draw], output, of=self.replicas * every)
            return gradient

        return of_draw

    def _receive(self, chunk: Chunk, ids: torch.Tensor) -> torch.Tensor:
        """What the chunk before has made of the tokens."""
        config = self.config
        ranks = parallel_state.get_context_parallel_world_size()
        if config.sequence_parallel:
            ranks *= parallel_state.get_tensor_model_parallel_world_size()
        dtype = torch.float32 if config.fp32_residual_connection else config.pipeline_dtype
        shape = (ids.shape[1] // ranks, len(ids), config.hidden_size)
        entered = torch.empty(shape, dtype=dtype, device=next(chunk.model.parameters()).device)
        dist.recv(entered, self.before, group=self.group)
        return entered.requires_grad_()

    def _receive_gradient(self, output: torch.Tensor) -> torch.Tensor:
        """The gradient of what a chunk has made, from the one after."""
        gradient = torch.empty_like(output, memory_format=torch.contiguous_format)
        dist.recv(gradient, self.after, group=self.group)
        return gradient

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        dist.send(tensor.contiguous(), rank, group=self.group)
