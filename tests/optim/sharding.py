"""Cuts a model's parameters into flat shards at any positions, in one process, with the sums added by hand."""

from __future__ import annotations

import numpy as np
import torch

from blockwise_lr import BlockwiseAdamMini, map_blocks
from blockwise_lr.optim import Fragment, ShardBoundaries, ShardMap


class Shards:
    """Flat shards of a model, one optimizer each, stepped as the ranks of one group would.

    Args:
        model: whose parameters are laid one after another and cut.
        edges: where to cut, ascending, without 0 and the end.
        optimizer: class; settings its arguments.
        copied, elsewhere: a parameter with copies, and where in it the copies are cut.
    """

    def __init__(self, model, edges, optimizer, copied=None, elsewhere=(), **settings):
        named = [(n, p.detach()) for n, p in model.named_parameters()]
        self.flat = torch.cat([p.reshape(-1) for _, p in named])
        starts = dict(zip([n for n, _ in named], np.cumsum([0] + [p.numel() for _, p in named]).tolist()))
        sizes = {n: p.numel() for n, p in named}
        self.bounds = list(zip([0, *edges], [*edges, self.flat.numel()]))
        cuts = {n: np.array([e - starts[n] for e in edges if starts[n] < e < starts[n] + sizes[n]]) for n, _ in named}
        if copied:
            cuts[copied] = np.union1d(cuts[copied], elsewhere).astype(int)
        cuts = {
            n: ShardBoundaries(positions, has_replicas=n == copied) for n, positions in cuts.items() if len(positions)
        }
        self.optimizers, self.tensors = [], []
        for low, high in self.bounds:
            fragments = [
                Fragment(
                    n,
                    max(low, starts[n]) - starts[n],
                    min(high, starts[n] + sizes[n]) - max(low, starts[n]),
                    max(low, starts[n]) - low,
                )
                for n, _ in named
                if max(low, starts[n]) < min(high, starts[n] + sizes[n])
            ]
            tensor = torch.nn.Parameter(self.flat[low:high].clone())
            made = optimizer([p for _, p in model.named_parameters()], block_map=map_blocks(model), **settings)
            made.param_groups[0]["params"] = [tensor]
            made.attach_shards(ShardMap([(tensor, fragments)], cuts))
            self.optimizers.append(made)
            self.tensors.append(tensor)

    def step(self, grads):
        """One step of all shards; grads: flat, all parameters."""
        for tensor, (low, high) in zip(self.tensors, self.bounds):
            tensor.grad = grads[low:high].clone()
        if isinstance(self.optimizers[0], BlockwiseAdamMini):
            self._add_sums()
        for optimizer in self.optimizers:
            optimizer.step()

    def _add_sums(self):
        """What the all-reduce does, over optimizers in place of ranks."""
        sums = [o._partial_sums([(t, t.grad, 1.0)]) for o, t in zip(self.optimizers, self.tensors)]
        shares = [
            [(share, s[id(t)]) for share in (o._sync.over_shards[0].shares if o._sync.over_shards else ())]
            for o, t, s in zip(self.optimizers, self.tensors, sums)
        ]
        stages = self.optimizers[0]._sync.over_shards
        if stages:
            buffer = torch.zeros(stages[0].size)
            for parts in shares:
                for share, values in parts:
                    buffer.index_add_(0, share.index, values[share.slots])
            for to, places in stages[0].ordered_reduction:
                buffer[to] += buffer[places]
            for parts in shares:
                for share, values in parts:
                    values[share.slots] = buffer[share.total]
        for optimizer, found in zip(self.optimizers, sums):
            optimizer._prereduced = found

    def weights(self):
        return torch.cat([t.detach() for t in self.tensors])
