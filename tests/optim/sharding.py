"""Cuts a model's parameters into flat shards at any positions, one for each rank of a group of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

from blockwise_lr import map_blocks
from blockwise_lr.optim import Fragment, ShardBoundaries, ShardMap


class Shards:
    """Flat shards of a model, one optimizer each, that sum what they share as the ranks of one group do.

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

    def train(self, steps, early=False):
        """Steps all shards, each in a thread that is a rank of a group of torch's threads.

        Args:
            steps: of each step the gradients of all parameters, flat.
            early: the sums of cut segments are reduced by a call before the step's.
        """
        store = dist.HashStore()
        _install_threaded_pg()
        _set_thread_isolation_mode(True)  # of the table of groups' names, too
        try:
            with ThreadPoolExecutor(len(self.tensors)) as threads:
                ranks = [threads.submit(self._rank, rank, store, steps, early) for rank in range(len(self.tensors))]
                for rank in ranks:
                    rank.result()
        finally:
            _set_thread_isolation_mode(False)
            _uninstall_threaded_pg()

    def _rank(self, rank, store, steps, early):
        dist.init_process_group("threaded", rank=rank, world_size=len(self.tensors), store=store)
        optimizer, tensor, (low, high) = self.optimizers[rank], self.tensors[rank], self.bounds[rank]
        for grads in steps:
            tensor.grad = grads[low:high].clone()
            if early and optimizer.segment_plans:
                optimizer.prereduce_segment_sums([(tensor, tensor.grad, 1.0)])
            optimizer.step()
        dist.destroy_process_group()

    def weights(self):
        return torch.cat([t.detach() for t in self.tensors])
