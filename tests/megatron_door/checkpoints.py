"""Saves and loads the tiny Megatron models through Megatron's own checkpoint functions; runs in the rank processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron_door.layouts import LENGTH, Layout, build_chunks, gather_full, load_full, megatron
from megatron_door.training import NAMES, _forward, batches, make_optimizer, make_scheduler, masters, start_model, wrap
from megatron_door.twin import MegatronTwin

SAVED_AT, TOTAL = 3, 8
LEGACY = "torch"


@dataclass(frozen=True)
class Job:
    """One run: an optimizer on a model under a layout, and the form of its checkpoint.

    Attributes:
        kind: BlockwiseAdamW, BlockwiseAdamMini or "adam".
        form: DistributedOptimizer's sharding type in torch_dist, or LEGACY.
        settings: of blockwise_lr.megatron.register.
        fused: DistributedOptimizer takes its own ways for Transformer Engine's fused Adam, as where that is installed.
    """

    kind: str
    variant: str = "gqa"
    layout: Layout = field(default_factory=Layout)
    form: str = "fully_reshardable"
    settings: dict = field(default_factory=dict)
    fused: bool = False


def saving(job: Job, folder: str) -> dict[str, Any]:
    """Trains SAVED_AT updates, saves, goes on to TOTAL; the whole weights and learning rates then."""
    return _run(job, folder, load=False)


def loading(job: Job, folder: str) -> dict[str, Any]:
    """Loads and trains up to TOTAL; the whole weights and learning rates then, or the error that loading raised."""
    return _run(job, folder, load=True)


def _run(job: Job, folder: str, load: bool) -> dict[str, Any]:
    import blockwise_lr.megatron
    from blockwise_lr.checkpoint import CheckpointError

    first = _first_weights(job.variant, job.layout.layers)
    with megatron(job.layout), _fused_adam(job.fused):
        undo = blockwise_lr.megatron.register(**{"block_lr_ratios": "paper", **job.settings})
        try:
            chunks = build_chunks(job.variant, job.layout)
            load_full(chunks, {name: value * 0 + 1 for name, value in first.items()} if load else first)
            parts = _Parts(job, chunks)
            if load:
                parts.load(folder)
                moments = parts.second_moments()
            else:
                parts.update(0, SAVED_AT)
                moments = parts.second_moments()
                parts.save(folder)
            parts.update(SAVED_AT, TOTAL)
            weights, apart = gather_full(chunks, first, masters(parts.optimizer, chunks) if job.layout.bf16 else None)
            return {
                "weights": weights,
                "apart": apart,
                "rates": parts.rates(),
                "moments": moments,
                "fingerprint": parts.fingerprint(),
            }
        except CheckpointError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            undo()


@functools.cache
def _first_weights(variant: str, layers: int) -> dict[str, torch.Tensor]:
    with megatron(Layout()):
        return {
            name: value.detach().clone()
            for name, value in MegatronTwin(start_model(variant, layers=layers)).values().items()
        }


class _Parts:
    """What a checkpoint consists of: model, optimizer, scheduler."""

    def __init__(self, job: Job, chunks: list[torch.nn.Module]) -> None:
        self.job, self.chunks, self.wrapped = job, chunks, wrap(chunks, job.layout)
        self.optimizer = make_optimizer(self.wrapped, NAMES.get(job.kind, job.kind), job.layout)
        self.scheduler = make_scheduler(self.optimizer)

    def update(self, first: int, last: int) -> None:
        """Updates on batches that do not depend on the layout."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        for ids in batches(TOTAL)[first:last].chunk(ranks, 1)[rank]:
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=[iter(ids.split(1)) for _ in self.wrapped],
                model=self.wrapped,
                num_microbatches=len(ids),
                seq_length=LENGTH,
                micro_batch_size=1,
                forward_only=False,
            )
            self.optimizer.step()
            self.scheduler.step(1)

    def rates(self) -> list[dict]:
        return [group.get("block_lrs") for group in self.optimizer.param_groups]

    def second_moments(self) -> dict[str, torch.Tensor]:
        """Parameter name -> exp_avg_sq of what this rank steps of it."""
        return {
            part.optimizer.fragments_of(p)[0].name: state["exp_avg_sq"].clone()
            for part in self.optimizer.chained_optimizers
            if self.job.kind in NAMES
            for p, state in part.optimizer.state.items()
            if "exp_avg_sq" in state
        }

    def fingerprint(self) -> str | None:
        inner = self.optimizer.chained_optimizers[0].optimizer
        return inner.record().fingerprint if hasattr(inner, "record") else None

    def save(self, folder: str) -> None:
        if self.job.form == LEGACY:
            self._save_legacy(folder)
        else:
            from megatron.core import dist_checkpointing

            with _writers_allowed():
                dist_checkpointing.save(self._sharded(is_loading=False), folder)

    def load(self, folder: str) -> None:
        if self.job.form == LEGACY:
            state = self._load_legacy(folder)
        else:
            from megatron.core import dist_checkpointing

            state = dist_checkpointing.load(self._sharded(is_loading=True), folder)
        for number, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[f"model{number}"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.job.form == LEGACY and self.job.layout.distributed:
            self.optimizer.load_parameter_state(os.path.join(folder, f"states-{_model_rank()}.pt"))
        self.scheduler.load_state_dict(state["scheduler"])

    def _sharded(self, is_loading: bool) -> dict:
        metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if self.job.layout.distributed:
            metadata["distrib_optim_sharding_type"] = self.job.form
        models = {
            f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(self.chunks)
        }
        merged = models if len(models) > 1 else models["model0"]
        return {
            **models,
            "optimizer": self.optimizer.sharded_state_dict(merged, is_loading=is_loading, metadata=metadata),
            "scheduler": self.scheduler.state_dict(),
        }

    def _save_legacy(self, folder: str) -> None:
        """As megatron.training does with --ckpt-format torch: a file per model-parallel rank, by data-parallel rank 0."""
        from megatron.core import parallel_state

        state = {f"model{number}": chunk.state_dict_for_save_checkpoint() for number, chunk in enumerate(self.chunks)}
        state |= {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        if parallel_state.get_data_parallel_rank() == 0:
            torch.save(state, os.path.join(folder, f"model-{_model_rank()}.pt"))
        if self.job.layout.distributed:
            self._use_gloo()
            self.optimizer.save_parameter_state(os.path.join(folder, f"states-{_model_rank()}.pt"))
        dist.barrier()

    def _load_legacy(self, folder: str) -> dict:
        self._use_gloo()
        return torch.load(os.path.join(folder, f"model-{_model_rank()}.pt"), weights_only=False)

    def _use_gloo(self) -> None:
        """The legacy format gathers over gloo groups that Megatron makes beside NCCL's; here all groups are gloo's."""
        for part in self.optimizer.chained_optimizers:
            if hasattr(part, "data_parallel_group"):
                part.data_parallel_group_gloo = part.data_parallel_group


@contextmanager
def _fused_adam(pretend: bool) -> Iterator[None]:
    from megatron.core.optimizer import distrib_optimizer

    names = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER")
    before = [getattr(distrib_optimizer, name) for name in names]
    for name in names if pretend else ():
        setattr(distrib_optimizer, name, True)
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(distrib_optimizer, name, value)


@contextmanager
def _writers_allowed() -> Iterator[None]:
    """Megatron writes in forked processes, which ranks, being daemons, may not have; and hands their results on through
    a manager process for asynchronous saves, which would outlive a rank that is killed, and is not needed here."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config, before = multiprocessing.current_process()._config, filesystem_async._results_queue
    config["daemon"], filesystem_async._results_queue = False, queue.Queue()
    try:
        yield
    finally:
        config["daemon"], filesystem_async._results_queue = True, before


def _model_rank() -> str:
    from megatron.core import parallel_state

    return (
        f"{parallel_state.get_tensor_model_parallel_rank()}-{parallel_state.get_pipeline_model_parallel_rank()}-"
        f"{parallel_state.get_expert_model_parallel_rank()}"
    )
