"""Labels drawn from a model's own predictions, also where tensor-parallel ranks hold the vocabulary in slices.

Drawn by inverting the distribution function, which takes one uniform number for each label: with the same numbers on all
ranks each label falls into one slice, and into the same row of the vocabulary however many slices there are.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ..blocks import BlockError
from .parts import IGNORED

_AT_ONCE = 2**24  # elements of the distribution function, which is in double precision


def probabilities(logits: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """(predictions, vocabulary) probabilities in float32, this rank's columns of them. Collective over the group.

    Args:
        logits: of the same shape.
        group: the ranks whose slices, in their order, are the vocabulary; None: this one has all of it.
    """
    logits = logits.detach().float()
    largest = logits.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    found = (logits - largest).exp_()
    total = found.sum(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(total, group=group)
    return found.div_(total)


def predicted(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which predictions count (predictions,), and the probabilities of these (counted, vocabulary).

    Raises:
        BlockError: none does.
    """
    counted = targets != IGNORED
    p = probabilities(logits[counted])
    if not len(p):
        raise BlockError("a batch predicts no token: all of its labels are -100; give batches with some")
    return counted, p


def drawn_labels(
    p: torch.Tensor,
    draws: int,
    seed: int,
    group: dist.ProcessGroup | None = None,
    *,
    rows: torch.Tensor | None = None,
    of: int | None = None,
) -> torch.Tensor:
    """(draws, predictions) labels as columns of ``p``; -1 where another rank's slice has the label. Collective.

    Args:
        p: from :func:`probabilities`.
        seed: the same on all ranks of the group.
        group: as for :func:`probabilities`.
        rows: which of ``of`` predictions these are, where ranks share them; all by default.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(of or len(p), draws, generator=generator, dtype=torch.float64).to(p.device)
    if rows is not None:
        uniform = uniform[rows]
    mass = p.sum(-1, dtype=torch.float64)
    masses, rank = mass[None], 0
    if group is not None:
        parts = [torch.empty_like(mass) for _ in range(group.size())]
        dist.all_gather(parts, mass, group=group)
        masses, rank = torch.stack(parts), group.rank()
    ends = masses.cumsum(0)  # the same on all ranks, so that each number falls into one slice
    start = ends[rank] - masses[rank] if rank == 0 else ends[rank - 1]
    wanted = (uniform * ends[-1, :, None]).minimum(ends[-1, :, None] * (1 - 1e-15))
    mine = (wanted >= start[:, None]) & (wanted < ends[rank, :, None])
    inside = wanted - start[:, None]
    at_once = max(_AT_ONCE // p.shape[-1], 1)
    found = [
        torch.searchsorted(part.cumsum(-1, dtype=torch.float64), numbers.contiguous(), right=True)
        for part, numbers in zip(p.split(at_once), inside.split(at_once))
    ]
    labels = torch.cat(found).clamp_(max=p.shape[-1] - 1)
    return torch.where(mine, labels, -1).T


def logit_gradient(p: torch.Tensor, labels: torch.Tensor, like: torch.Tensor, *, of: int | None = None) -> torch.Tensor:
    """The gradient of the mean cross-entropy with those labels, in this rank's columns of the logits.

    Args:
        p: from :func:`probabilities`.
        labels: (predictions,) from :func:`drawn_labels`.
        like: of the type that the gradient shall have.
        of: how many predictions the mean is over, where these are not all.
    """
    gradient = p.clone()
    rows = torch.nonzero(labels >= 0).flatten()
    gradient[rows, labels[rows]] -= 1
    return gradient.div_(of or len(p)).to(like.dtype)


def seed_of(*numbers: int) -> int:
    """A seed from a run's seed, a rank and the number of a batch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
