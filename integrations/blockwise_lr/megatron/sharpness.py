"""Sharpness per block type of a Megatron model under data, tensor, sequence, context, expert and pipeline parallelism.

The quantity and the estimator are those of :mod:`blockwise_lr.measure.sharpness`; what each rank counts is in
:mod:`.sharpness_parts`. Without context and expert parallelism each data-parallel rank has draws of its own. With them no
rank has a gradient by itself (experts get tokens of several), so that a draw is of all data-parallel ranks' batches together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..blocks import BlockError
from ..collective.agreement import gathered
from ..collective.errors import run_on_all_ranks
from ..measure.labels import seed_of
from ..measure.parts import as_it_was
from ..measure.sharpness import Estimate, Sharpness
from .mapping import map_chunks
from .sharpness_parts import Chunk, Forward, Key, Pipeline, context_positions, every_expert

# TransformerConfig's field -> what is refused by that name where it is set, and what to do
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
    """What a GPTModel makes of token ids: on the last stage (sequences, length / CP, vocabulary / TP) logits."""
    mine = context_positions(ids.shape[1], ids.device)
    return model(ids[:, mine], mine.expand(len(ids), -1), None, runtime_gather_output=False)


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
    a forward pass a batch and a backward pass a draw, and a pipeline runs one stage at a time. Under context or expert
    parallelism it also costs an all-reduce of the gradients a draw, and holds this rank's gradients. Not run on a GPU or with
    Transformer Engine yet.

    Args:
        model: what ``get_model`` gives: the model's chunks on this rank, wrapped or not.
        batches: (sequences, length) whole token ids, each predicting the next, of one shape: the same on all ranks of a
            model replica (those of context parallelism take their parts), other ones (as many) on each data-parallel rank.
        rules: block rules, as for the optimizer.
        draws, seed: as for :func:`blockwise_lr.measure.measure_sharpness`.
        forward: calls the model with whole token ids; under context parallelism its logits are those of Megatron's two
            pieces of each sequence.

    Raises:
        BlockError: a parallelism or feature that is refused by name, batches that are none, on all ranks.
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    ids = run_on_all_ranks(lambda: _checked(chunks, batches, draws), "measuring the sharpness")
    maps = map_chunks(chunks, rules=rules)
    bare = [_bare(chunk) for chunk in chunks]
    together = _is_together(get_model_config(chunks[0]))
    if together:
        _same_on_all_ranks(ids)
    pipeline = Pipeline([Chunk(chunk, maps.ours, together) for chunk in bare], forward, together)
    keys = every_expert(maps.stages)
    counted = pipeline.numel()
    figures = [[float(counted.get(key, 0)) for key in keys]]
    replica = parallel_state.get_data_parallel_rank()
    with ExitStack() as stack:
        for chunk in bare:
            stack.enter_context(as_it_was(chunk))
            stack.enter_context(_separate_gradients(chunk))
        for number, batch in enumerate(ids):
            for squares in pipeline.squares(batch, draws, seed_of(seed, replica, number)):
                figures.append([squares.get(key, 0.0) for key in keys])
    tokens = sum(batch[:, 1:].numel() for batch in ids)
    return _over_ranks(keys, figures, tokens, ids[0].device, together)


def _is_together(config: Any) -> bool:
    """Whether a draw is of all data-parallel ranks together."""
    return max(getattr(config, name, 1) or 1 for name in ("context_parallel_size", "expert_model_parallel_size")) > 1


def _same_on_all_ranks(ids: Sequence[torch.Tensor]) -> None:
    told = gathered((len(ids), tuple(ids[0].shape)))
    odd = next((rank for rank, one in enumerate(told) if one != told[0]), None)
    if odd is not None:
        (first, of), (other, shape) = told[0], told[odd]
        raise BlockError(
            f"rank 0 has {first} batches of shape {of} to measure on, and rank {odd} has {other} of shape {shape}; under "
            f"context and expert parallelism give as many of one shape on every rank"
        )


def _checked(chunks: Sequence[torch.nn.Module], batches: Iterable[torch.Tensor], draws: int) -> list[torch.Tensor]:
    config = get_model_config(chunks[0])
    features = _FEATURES | (_SLICED if config.tensor_model_parallel_size > 1 else {})
    if config.sequence_parallel:
        features.pop("num_moe_experts", None)
    asked = next((name for name in features if getattr(config, name, None)), None)
    if asked is not None:
        raise BlockError(f"the sharpness is not measured with {features[asked]}")
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
    pieces = 2 * config.context_parallel_size
    if config.context_parallel_size > 1 and ids[0].shape[1] % pieces:
        raise BlockError(
            f"sequences of {ids[0].shape[1]} tokens cannot be cut for context parallelism; give a multiple of {pieces}"
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


def _over_ranks(
    keys: Sequence[Key], figures: list[list[float]], tokens: int, device: torch.device, together: bool
) -> Sharpness:
    """All ranks' counts together: those of a draw are added up, and the draws of replicas that have their own put in a row."""
    found = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(found, group=None if together else parallel_state.get_model_parallel_group())
    numel, traces = found[0].tolist(), found[1:].T.tolist()
    if together:
        answers, replicas = [(traces, tokens)], parallel_state.get_data_parallel_world_size()
    else:
        answers, replicas = gathered((traces, tokens), parallel_state.get_data_parallel_group()), 1
    parts = {
        key: Estimate(int(numel[number]), tuple(x for every, _ in answers for x in every[number]))
        for number, key in enumerate(keys)
        if numel[number]
    }
    return Sharpness(parts, replicas * sum(count for _, count in answers))
