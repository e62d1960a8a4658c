"""The expected gradient of every layer's feed-forward output at initialization (arXiv 2002.04745, theorem 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..blocks import BlockError


def outputs_of(result: Any) -> torch.Tensor:
    """The logits of what a model returns."""
    logits = getattr(result, "logits", result[0] if isinstance(result, tuple) else result)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise BlockError("the model returns no logits of shape (batch, length, vocabulary); give one with its head")
    return logits


def gradient_norms(
    make: Callable[[], torch.nn.Module],
    outputs: Sequence[str],
    vocabulary: int,
    *,
    seeds: int = 5,
    batch: int = 2,
    length: int = 64,
) -> list[float]:
    """The norm of the gradient of each feed-forward network's output weight, the mean over initializations.

    Tokens and labels are random, two batches per initialization.

    Args:
        make: builds the model anew, with random weights.
        outputs: names of the modules that hold the weights, first layer first.
        vocabulary: number of tokens to draw from.
        seeds: initializations.
        batch, length: of token ids.

    Raises:
        BlockError: the model returns no logits.
    """
    sums = [0.0] * len(outputs)
    draws = 2
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = make().eval()
        weights = [_weight(model.get_submodule(name)) for name in outputs]
        for _ in range(draws):
            ids, labels = torch.randint(vocabulary, (2, batch, length))
            logits = outputs_of(model(ids))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            for layer, grad in enumerate(grads):
                sums[layer] += 0.0 if grad is None else float(grad.norm())
    return [total / (seeds * draws) for total in sums]


def _weight(module: torch.nn.Module) -> torch.nn.Parameter:
    return max(module.parameters(recurse=False), key=lambda p: p.numel())
