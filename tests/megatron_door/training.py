"""Trains the tiny models through Megatron's own DDP, schedules, optimizers and lr scheduler, and their twins by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from kinds import KINDS
from megatron_door.layouts import LENGTH, VOCABULARY, Layout, build_chunks, gather_full, load_full, megatron
from megatron_door.twin import BLOCK_RATIOS, MegatronTwin, model_inputs
from ranks import pool
from references import once
from twins import REFERENCES, clip_blocks, paper_lr, worst_difference

LR, MIN_LR, WARMUP, TOTAL, DECAY, BETAS, EPS, CLIP, BATCH = 2e-3, 1e-4, 3, 12, 0.1, (0.9, 0.95), 1e-5, 0.5, 4
NAMES = {name: kind.megatron for name, kind in KINDS.items()}


def batches(steps: int) -> torch.Tensor:
    """(steps, BATCH, LENGTH + 1) token ids."""
    return torch.randint(0, VOCABULARY, (steps, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(7))


def start_model(variant: str, bf16: bool = False, layers: int = 2) -> torch.nn.Module:
    """The single-process model everything starts from; call it under a layout without model parallelism."""
    torch.manual_seed(0)
    (model,) = build_chunks(variant, Layout(bf16=bf16, layers=layers))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # they start at 0, where a relative difference says nothing
                p.normal_(0, 0.1)
    return model


def megatron_lr(step: int, ratio: float) -> float:
    """Megatron's schedule after ``step`` updates: linear from 0 to ratio * LR, then a cosine to MIN_LR."""
    if step <= WARMUP:
        return ratio * LR * step / WARMUP
    return MIN_LR + (ratio * LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP)))


@once
def reference(
    variant: str,
    kind: str,
    steps: int,
    dtype: torch.dtype = torch.float32,
    schedule: str = "megatron",
    vector_biases: bool = False,
    layers: int = 2,
    limits: tuple[tuple[str, float | str], ...] = (),
) -> tuple[dict, dict, list[float]]:
    """(weights at the start, weights after the steps, losses) of the unfused twin in one process, in micro batches of 1.

    "adam" is torch's AdamW with one learning rate. In bf16 the twin computes in it and keeps fp32 weights and gradients.
    Megatron's groups take all ranks, so a pool of one rank computes it (:func:`prepared`) and the others read it.
    ``limits`` are largest gradient norms of block types, beside the global one.
    The "paper" schedule begins with update 1 of the warmup and ends with ``steps``, Megatron's begins with 0.
    """
    assert dist.get_world_size() == 1, "call prepared() first"
    with megatron(Layout()):
        twin = MegatronTwin(start_model(variant, dtype == torch.bfloat16, layers), vector_biases)
        first = {name: value.detach().clone() for name, value in twin.values().items()}
        ratios = dict.fromkeys(BLOCK_RATIOS, 1.0) if kind == "adam" else BLOCK_RATIOS
        # what Megatron calls --adam-beta1 is not Lion's
        betas = (0.95, 0.98) if kind == "BlockwiseLion" and schedule != "paper" else BETAS
        optimizer = REFERENCES[kind if kind != "adam" else "BlockwiseAdamW"](twin, betas, EPS, DECAY, ratios)
        losses, norms = [], {}
        for number, batch in enumerate(batches(steps)):
            losses.append(sum(twin.backward(ids, 1 / BATCH, dtype) / BATCH for ids in batch.split(1)))
            twin.clip(CLIP)
            clip_blocks(twin, dict(limits), norms)
            optimizer.step(
                lambda ratio: (
                    megatron_lr(number, ratio)
                    if schedule == "megatron"
                    else paper_lr(number + 1, ratio, LR, MIN_LR, WARMUP, steps)
                )
            )
        return first, {name: value.detach().clone() for name, value in twin.values().items()}, losses


def prepared(*arguments: Any, **options: Any) -> None:
    """Has a pool of one rank compute :func:`reference` for the ranks of other pools; for the process of the tests."""
    pool(1).run(_computed, arguments, options)


def _computed(arguments: tuple, options: dict[str, Any]) -> None:
    reference(*arguments, **options)


def wrap(chunks: list[torch.nn.Module], layout: Layout) -> list[torch.nn.Module]:
    """The chunks in Megatron's DistributedDataParallel (and Float16Module)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed,
        bucket_size=9000 if layout.distributed else None,
        num_distributed_optimizer_instances=layout.instances,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed,
    )
    wrapped = [
        DistributedDataParallel(
            config, ddp, Float16Module(config, chunk) if layout.bf16 else chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def make_optimizer(wrapped: list[torch.nn.Module], name: str, layout: Layout) -> Any:
    """Megatron's optimizer around ours."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer=name,
        lr=LR,
        min_lr=MIN_LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        use_distributed_optimizer=layout.distributed,
        overlap_param_gather=layout.overlap and layout.distributed,
    )
    return get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)


def make_scheduler(optimizer: Any) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=MIN_LR,
        lr_warmup_steps=WARMUP,
        lr_decay_steps=TOTAL,
        lr_decay_style="cosine",
        start_wd=DECAY,
        end_wd=DECAY,
        wd_incr_steps=TOTAL,
        wd_incr_style="constant",
    )


def _forward(data: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    from megatron.core import parallel_state
    from megatron_door.parts import context_positions

    ids = next(data)
    ranks = parallel_state.get_context_parallel_world_size()
    mine = context_positions(LENGTH, parallel_state.get_context_parallel_rank(), ranks)
    tokens, positions, mask = model_inputs(ids)
    output = model(tokens[:, mine], positions[:, mine], mask, labels=ids[:, 1:][:, mine])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict]:
        mean = losses.float().mean() / ranks  # this rank's part of the mean over all positions
        return mean, {"loss": mean.detach()}

    return output, loss


def train(
    wrapped: list[torch.nn.Module], optimizer: Any, steps: int, each_step: Callable[[], None] | None = None
) -> list[float]:
    """Trains on this rank's share of the batches; returns the mean losses where this rank computes them."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    scheduler = make_scheduler(optimizer)
    share = batches(steps).chunk(parallel_state.get_data_parallel_world_size(), 1)[
        parallel_state.get_data_parallel_rank()
    ]
    losses = []
    for ids in share:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        stored = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(ids.split(1)) for _ in wrapped],
            model=wrapped,
            num_microbatches=len(ids),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
        losses.append(float(sum(entry["loss"] for entry in stored) / len(stored)) if stored else float("nan"))
        if each_step:
            each_step()
    return losses


def masters(optimizer: Any, chunks: list[torch.nn.Module]) -> dict[int, tuple[int, torch.Tensor]]:
    """id of a bf16 parameter -> (where in it the shard begins, this rank's fp32 shard)."""
    found = {}
    for chunk in chunks:
        for p in chunk.parameters():
            main = getattr(p, "main_param", None)
            if main is not None:
                owner = next(
                    (o for o in optimizer.chained_optimizers if p in getattr(o, "model_param_gbuf_map", ())), None
                )
                found[id(p)] = (owner._get_model_param_range_map(p)["param"].start if owner else 0, main)
    return found


def trained(
    variant: str,
    kind: str,
    layout: Layout,
    steps: int,
    first: dict[str, torch.Tensor],
    watch: Callable[[dict[str, torch.Tensor]], None] | None = None,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after training under a layout, and how far ranks' copies of them are apart.

    ``watch`` gets, in bf16, the whole fp32 gradients that each step of our optimizer starts from.
    """
    import blockwise_lr.megatron

    with megatron(layout):
        undo = blockwise_lr.megatron.register(**{"block_lr_ratios": "paper", **settings})
        try:
            chunks = build_chunks(variant, layout)
            load_full(chunks, first)
            wrapped = wrap(chunks, layout)
            optimizer = make_optimizer(wrapped, NAMES.get(kind, kind), layout)
            if watch:
                optimizer.chained_optimizers[0].optimizer.register_step_pre_hook(
                    lambda *_: watch(
                        gather_full(
                            chunks,
                            first,
                            {key: (start, shard.grad) for key, (start, shard) in masters(optimizer, chunks).items()},
                        )[0]
                    )
                )
            train(wrapped, optimizer, steps)
            if layout.overlap and layout.distributed:  # the next forward pass would gather what the last step has made
                for chunk in wrapped:
                    chunk.disable_forward_pre_hook(param_sync=True)
            return gather_full(chunks, first, masters(optimizer, chunks) if layout.bf16 else None)
        finally:
            undo()


def parity(variant: str, kind: str, layout: Layout, steps: int = 10, **settings: Any) -> dict[str, Any]:
    """Worst relative difference (2-norm) of any tensor from the twin's, and how far ranks' copies are apart.

    In bf16 the difference is that of the fp32 weights' changes over all steps.
    """
    first, wanted, _ = reference(
        variant,
        kind,
        steps,
        torch.bfloat16 if layout.bf16 else torch.float32,
        layers=layout.layers,
        limits=tuple((settings.get("block_clip") or {}).items()),
    )
    found, apart = trained(variant, kind, layout, steps, first, **settings)
    if layout.bf16:
        found, wanted = ({name: value - first[name] for name, value in end.items()} for end in (found, wanted))
    return {**worst(found, wanted, kind), "apart": apart}


def steps_parity(variant: str, kind: str, layout: Layout, steps: int = 10, **settings: Any) -> dict[str, Any]:
    """In bf16: the same for fp32 weights of the twin that get this run's own gradients, so that no rounding differs."""
    with megatron(Layout()):
        twin = MegatronTwin(start_model(variant, bf16=True))
    first = {name: value.detach().clone() for name, value in twin.values().items()}
    optimizer = REFERENCES[kind](twin, BETAS, EPS, DECAY, BLOCK_RATIOS)
    numbers = iter(range(steps))

    def follow(gradients: dict[str, torch.Tensor]) -> None:
        number = next(numbers)
        twin.set_gradients(gradients)
        optimizer.step(lambda ratio: megatron_lr(number, ratio))

    found, apart = trained(variant, kind, layout, steps, first, follow, **settings)
    return {**worst(found, {name: value.detach() for name, value in twin.values().items()}), "apart": apart}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], kind: str | None = None) -> dict[str, Any]:
    """The tensor with the largest relative difference (2-norm), as ``twins.worst_difference`` takes it."""
    differences = {name: worst_difference({name: found[name]}, {name: wanted[name]}, kind) for name in wanted}
    name = max(differences, key=lambda name: differences[name])
    return {"worst": differences[name], "name": name}
