"""The adapter contract: all that a framework's adapter tells an optimizer of ours, in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..blocks.layout import Rate
from ..checkpoint.target import SavePolicy
from ..plan.shards import ShardMap


@dataclass(frozen=True)
class Attachment:
    """What an adapter supplies once its framework has wrapped the optimizer, by ``optimizer.attach(Attachment(...))``.

    Before that the adapter has built the optimizer, inside ``BlockwiseOptimizer.holding_steps()`` where the framework takes
    trial steps. Errors of any rank meet on all of them by :func:`~blockwise_lr.collective.run_on_all_ranks`.

    Attributes:
        shards: which part of which parameter lies where in the tensors that the framework has put into the param groups;
            None where these are the model's own parameters.
        saving: how the framework saves and loads optimizer states.
        rates_of_groups: per param group, what rates are in it on any pipeline stage, where the framework makes groups of its
            own; for reports of learning rates.
        matrix_device: where Muon works on matrices and ranks send them, if not where the tensors are (offloaded ones).
    """

    shards: ShardMap | None = None
    saving: SavePolicy = field(default_factory=SavePolicy)
    rates_of_groups: Sequence[tuple[Rate, ...]] | None = None
    matrix_device: torch.device | None = None
