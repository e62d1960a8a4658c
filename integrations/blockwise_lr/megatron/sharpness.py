"""Sharpness per block type of a Megatron model under data, tensor, sequence and pipeline parallelism.

The quantity and the estimator are those of :mod:`blockwise_lr.measure.sharpness`. Each rank squares the gradients of the slices
it has; what several tensor-parallel ranks have copies of counts once, and what they have parts of the gradient of (norms
under sequence parallelism) is added up before it is squared. Only the last pipeline stage draws labels, the same on all
ranks of a model, and an embedding that the first and the last stage share counts once, with the gradient of both uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..blocks import BlockError, BlockType
from ..blocks.marks import marks_of
from ..collective.agreement import gathered
from ..collective.errors import run_on_all_ranks
from ..measure.gradients import Gradients
from ..measure.labels import drawn_labels, logit_gradient, probabilities, seed_of
from ..measure.parts import BlockParts, as_it_was
from ..measure.sharpness import Estimate, Sharpness, Squares
from .mapping import map_chunks

Forward = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
Key = tuple[str, BlockType]

# TransformerConfig's field -> what is refused by that name where it is above 1, and what to do
_SIZES = {
    "context_parallel_size": "context parallelism (--context-parallel-size); measure a checkpoint without it",
    "expert_model_parallel_size": "expert parallelism (--expert-model-parallel-size); measure a checkpoint without it",
    "virtual_pipeline_model_parallel_size": "virtual pipeline stages; measure a checkpoint without them",
}
# the same, where it is set
_FEATURES = {
    "mtp_num_layers": "multi-token prediction (--mtp-num-layers), whose loss cannot be left out",
    "fp8": "fp8, whose scales a measurement would move",
    "fp4": "fp4, whose scales a measurement would move",
    "defer_embedding_wgrad_compute": "--defer-embedding-wgrad-compute; leave it out",
}
# under tensor parallelism, the second without --sequence-parallel, as Megatron itself trains no experts
_SLICED = {
    "multi_latent_attention": "multi-latent attention under tensor parallelism; measure a checkpoint without it",
    "num_moe_experts": "experts under tensor parallelism without --sequence-parallel; add it",
}


def gpt_forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What a GPTModel makes of token ids: on the last stage (sequences, length, vocabulary / TP) logits."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return model(ids, positions, None, runtime_gather_output=False)


def measure_sharpness(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    batches: Iterable[torch.Tensor],
    *,
    rules: Iterable[Any] = (),
    draws: int = 8,
    seed: int = 0,
    forward: Forward = gpt_forward,
) -> Sharpness:
    """Estimates the sharpness of every block type of a Megatron model, without changing anything of it.

    Gradients, also those in Megatron's buffers, modes and random number generators are as before. Dropout is off and no
    auxiliary loss of experts is part of it. Called by all ranks between iterations, and the same is returned on all; costs
    a forward pass a batch and a backward pass a draw, and a pipeline runs one stage at a time. Not run on a GPU or with
    Transformer Engine yet.

    Args:
        model: what ``get_model`` gives: the model's one chunk on this rank, wrapped or not.
        batches: (sequences, length) token ids, each predicting the next, of one shape: the same on all ranks of a model
            replica, other ones (as many) on each data-parallel rank.
        rules: block rules, as for the optimizer.
        draws, seed: as for :func:`blockwise_lr.measure.measure_sharpness`.
        forward: calls the model.

    Raises:
        BlockError: a parallelism or feature that is refused by name, batches that are none, on all ranks.
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    ids = run_on_all_ranks(lambda: _checked(chunks, batches, draws), "measuring the sharpness")
    maps = map_chunks(chunks, rules=rules)
    stage = _Stage(_bare(chunks[0]), maps.ours, forward)
    keys = [(name, block) for name in sorted(maps.stages) for block in maps.stages[name].block_numel()]
    counted = stage.numel()
    figures = [[float(counted.get(key, 0)) for key in keys]]
    replica = parallel_state.get_data_parallel_rank()
    with as_it_was(stage.model), _separate_gradients(stage.model):
        for number, batch in enumerate(ids):
            for squares in stage.squares(batch, draws, seed_of(seed, replica, number)):
                figures.append([squares.get(key, 0.0) for key in keys])
    tokens = sum(batch[:, 1:].numel() for batch in ids)
    return _over_ranks(keys, figures, tokens, ids[0].device)


def _checked(chunks: Sequence[torch.nn.Module], batches: Iterable[torch.Tensor], draws: int) -> list[torch.Tensor]:
    config = get_model_config(chunks[0])
    features = _FEATURES | (_SLICED if config.tensor_model_parallel_size > 1 else {})
    if config.sequence_parallel:
        features.pop("num_moe_experts", None)
    asked = [name for name in _SIZES if (getattr(config, name, None) or 1) > 1]
    asked += [name for name in features if getattr(config, name, None)]
    if asked or len(chunks) > 1:
        told = (_SIZES | features)[asked[0] if asked else "virtual_pipeline_model_parallel_size"]
        raise BlockError(f"the sharpness is not measured with {told}")
    if getattr(getattr(chunks[0], "ddp_config", None), "overlap_param_gather", False):
        raise BlockError("the sharpness is not measured with --overlap-param-gather; leave it out")
    if draws < 1:
        raise BlockError(f"draws is {draws}; give at least 1, and 8 or more for errors that mean something")
    ids = list(batches)
    if not ids or any(not isinstance(one, torch.Tensor) or one.dim() != 2 or one.shape[1] < 2 for one in ids):
        raise BlockError(
            "there is no batch to measure on, or one of no shape (sequences, 2 or more token ids); give some"
        )
    if any(one.shape != ids[0].shape for one in ids):
        raise BlockError(
            f"batches are of shapes {sorted({tuple(one.shape) for one in ids})}; give batches of one shape"
        )
    return ids


def _bare(chunk: Any) -> torch.nn.Module:
    """The model inside of Megatron's wrappers, without their hooks and conversions."""
    while hasattr(chunk, "module") and isinstance(chunk.module, torch.nn.Module):
        chunk = chunk.module
    return chunk


@contextmanager
def _separate_gradients(model: torch.nn.Module) -> Iterator[None]:
    """While no linear layer adds its weight's gradient to Megatron's buffers by itself."""
    names = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")
    found = [(module, name) for module in model.modules() for name in names if getattr(module, name, False) is True]
    for module, name in found:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in found:
            setattr(module, name, True)


class _Stage:
    """This rank's pipeline stage of the model, and its squares of gradients, each counted by one rank."""

    def __init__(self, model: Any, block_map: Any, forward: Forward) -> None:
        self.model, self.forward, self.config = model, forward, get_model_config(model)
        self.parts = BlockParts(model, block_map, slices=True)
        self.named = dict(self.parts.named)
        self.known = {name: block_map.require_name(p) for name, p in self.parts.named}
        self.sums = Squares(self.parts)
        self.first = parallel_state.is_pipeline_first_stage()
        self.last = parallel_state.is_pipeline_last_stage()
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.slices = parallel_state.get_tensor_model_parallel_group()
        self.shared = {
            name for name, p in self.parts.named if marks_of(p).is_tied_copy and not (self.first and self.last)
        }
        self.partial = {name for name, p in self.parts.named if self.slices.size() > 1 and self._is_partial(name, p)}
        self._kept: dict[str, torch.Tensor] = {}

    def _is_partial(self, name: str, p: torch.Tensor) -> bool:
        """As finalize_model_grads of Megatron: copies whose gradient each tensor-parallel rank has a part of."""
        marked = self.config.sequence_parallel and getattr(p, "sequence_parallel", False)
        of_heads = self.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        return bool(marked or of_heads) and marks_of(p).split_axis is None

    def _counts(self, name: str) -> bool:
        """Whether this rank is the one that counts what it has of a parameter."""
        if name in self.shared and not self.first:
            return False
        return marks_of(self.named[name]).split_axis is not None or self.slices.rank() == 0

    def numel(self) -> dict[Key, int]:
        """Elements that this rank counts."""
        return {
            (self.known[name], block): self.parts.numel(name, block)
            for name, block in self.sums.keys
            if self._counts(name)
        }

    def squares(self, ids: torch.Tensor, draws: int, seed: int) -> Iterator[dict[Key, float]]:
        """Predicted tokens x the squares that this rank counts, for each draw. Collective over the ranks of the model."""
        tokens = ids[:, 1:].numel()
        slices = self.slices if self.slices.size() > 1 else None
        gradients = Gradients(self.model, set(self.named), self._take)
        with torch.enable_grad(), gradients.watching():
            entered = None if self.first else self._receive(ids)
            if entered is not None:
                self.model.set_input_tensor(entered)
            output = self.forward(self.model, ids)
            if self.last:
                p = probabilities(output[:, :-1].flatten(0, 1), slices)
                labels = drawn_labels(p, draws, seed, slices)
            else:
                self._send(output.detach(), parallel_state.get_pipeline_model_parallel_next_rank())
            for draw in range(draws):
                if self.last:
                    gradient = torch.zeros_like(output)
                    gradient[:, :-1] = logit_gradient(p, labels[draw], output).unflatten(0, (len(ids), -1))
                else:
                    gradient = torch.empty_like(output, memory_format=torch.contiguous_format)
                    dist.recv(gradient, parallel_state.get_pipeline_model_parallel_next_rank(), group=self.group)
                back = gradients.backward(output, gradient, keep=draw + 1 < draws, entered=entered)
                if back is not None:
                    self._send(back, parallel_state.get_pipeline_model_parallel_prev_rank())
                self._complete()
                found = zip(self.sums.keys, self.sums.drawn())
                yield {(self.known[name], of): tokens * square for (name, of), square in found if self._counts(name)}
        if entered is not None:
            self.model.set_input_tensor(None)

    def _receive(self, ids: torch.Tensor) -> torch.Tensor:
        """What the stage before has made of the tokens."""
        config = self.config
        length = ids.shape[1] // (self.slices.size() if config.sequence_parallel else 1)
        dtype = torch.float32 if config.fp32_residual_connection else config.pipeline_dtype
        shape = (length, len(ids), config.hidden_size)
        entered = torch.empty(shape, dtype=dtype, device=next(self.model.parameters()).device)
        dist.recv(entered, parallel_state.get_pipeline_model_parallel_prev_rank(), group=self.group)
        return entered.requires_grad_()

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        dist.send(tensor.contiguous(), rank, group=self.group)

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        if name in self.shared or name in self.partial:
            self._kept[name] = gradient.float().clone()
        else:
            self.sums.take(name, gradient)

    def _complete(self) -> None:
        """Adds up, over ranks, the gradients that they have parts of."""
        kept, self._kept = self._kept, {}
        for name in sorted(self.partial | self.shared):
            gradient = kept.get(name)
            if gradient is None:
                gradient = torch.zeros_like(self.named[name], dtype=torch.float32)
            group = parallel_state.get_embedding_group() if name in self.shared else self.slices
            dist.all_reduce(gradient, group=group)
            if getattr(self.named[name], "average_gradients_across_tp_domain", False):
                gradient /= self.slices.size()
            self.sums.take(name, gradient)


def _over_ranks(keys: Sequence[Key], figures: list[list[float]], tokens: int, device: torch.device) -> Sharpness:
    """All ranks' counts together: those of a model replica are added up, the draws of the replicas put in a row."""
    found = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(found, group=parallel_state.get_model_parallel_group())
    numel, traces = found[0].tolist(), found[1:].T.tolist()
    answers = gathered((traces, tokens), parallel_state.get_data_parallel_group())
    parts = {
        key: Estimate(int(numel[number]), tuple(x for every, _ in answers for x in every[number]))
        for number, key in enumerate(keys)
        if numel[number]
    }
    return Sharpness(parts, sum(count for _, count in answers))
