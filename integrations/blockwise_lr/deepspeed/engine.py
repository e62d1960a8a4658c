"""What a DeepSpeed engine with one of our optimizers gets beyond it: shards, early sums, learning rates in the monitor."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import log_dist

from ..blocks import BlockError
from ..checkpoint.target import SavePolicy
from ..collective import roll_call
from ..collective.errors import run_on_all_ranks
from ..optim.attachment import Attachment
from ..optim.base import BlockwiseOptimizer
from ..optim.segmentwise import SegmentwiseOptimizer
from ..patches import undo_instance
from ..patches.deepspeed_instances import LEARNING_RATES, ONE_DIVISION, UNIVERSAL_LOADS
from ..patches.deepspeed_variants import DIVIDES_AT_EACH_OUTPUT
from ..patches.upstream_deepspeed import BF16, UPSTREAM, ZERO3, ZERO12, is_a
from .agreement import compare_slices, is_callable
from .flats import correct_mappings
from .own_keys import start_own_keys
from .segment_sums_hook import prereduce_once_per_step
from .shard_maps import shard_map
from .stages import whole_model_map
from .state_access import serve_optimizer_states
from .universal_loading import UniversalFolder, load_universal, load_weights
from .unsupported import refuse_unsupported


def optimizer_of(engine: Any) -> BlockwiseOptimizer:
    """The blockwise optimizer inside an engine.

    Raises:
        BlockError: the engine has another optimizer.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise BlockError(
            f"the engine's optimizer is {type(optimizer).__name__}, not a blockwise one; "
            f'set "optimizer": {{"type": "BlockwiseAdamW"}} in the ds_config'
        )
    return optimizer


def block_lrs(engine: Any) -> list[dict[str, float]]:
    """The current learning rate of each block type, per param group of a DeepSpeed engine.

    Raises:
        BlockError: the engine's optimizer is not a blockwise one.
    """
    return optimizer_of(engine).block_lrs()


def attach(engine: Any) -> None:
    """Tells an engine's blockwise optimizer what DeepSpeed's wrapper has put into it. Does nothing for other optimizers.

    Raises:
        BlockError: a wrapper or an offload this adapter does not support.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, BlockwiseOptimizer):
        return
    if is_callable(engine.client_optimizer):  # whose class was not known when the ranks were compared
        refuse_unsupported(engine._config, engine.module, optimizer, engine.mesh_device)
    if engine.autotp_size() > 1:
        compare_slices(optimizer)
    wrapper = engine.optimizer
    run_on_all_ranks(lambda: UPSTREAM.check_instance(engine, wrapper), "attaching the optimizer")
    shards = shard_map(wrapper, optimizer, engine.module, engine.mpu)
    is_pipeline = isinstance(engine.module, PipelineModule)
    whole_map = whole_model_map(optimizer.block_map) if is_pipeline else None
    saving = SavePolicy(recorded_map=whole_map, collective_load=shards is not None)
    optimizer.attach(Attachment(shards, saving, matrix_device=engine.device))
    if _is_zero(wrapper):
        serve_optimizer_states(wrapper, optimizer)
    if optimizer.block_clip:
        run_on_all_ranks(lambda: _refuse_partial_norms(engine, optimizer), "attaching the optimizer")
    if isinstance(optimizer, SegmentwiseOptimizer) or optimizer.block_clip:
        run_on_all_ranks(lambda: prereduce_once_per_step(wrapper, optimizer), "attaching the optimizer")
    _save_for_any_layout(engine, optimizer)
    if DIVIDES_AT_EACH_OUTPUT.here and not is_pipeline:
        _divide_loss(engine)
    _report_to_monitor(engine, optimizer)
    log_dist(
        f"{optimizer.describe()}; get_lr() is the base rate, block_lrs(engine) has all",
        ranks=[0],
        level=logging.WARNING,
    )


def _refuse_partial_norms(engine: Any, optimizer: BlockwiseOptimizer) -> None:
    """Raises BlockError where other ranks hold other parameters, whose squares block_clip's norms would lack."""
    groups = () if optimizer.shards is None else [group for group in optimizer.shards.groups if group is not None]
    parts = isinstance(engine.module, PipelineModule) or engine.autotp_size() > 1 or engine.mpu is not None
    if parts or engine.has_moe_layers or any(dist.get_world_size(group) < dist.get_world_size() for group in groups):
        raise BlockError(
            "block_clip needs every block type's gradients over data-parallel ranks alone, and this engine has tensor, "
            "pipeline or expert parallelism, or shards over a part of the ranks; leave it out, and use gradient_clipping"
        )


def check_built(engine: Any) -> None:
    """Checks an engine that is complete for what is read of it later, as in a save, where its optimizer is ours; starts what
    keys of ours in its ds_config ask for.

    Raises:
        PatchError: DeepSpeed has changed; on every rank.
        BlockError: as :func:`~blockwise_lr.deepspeed.own_keys.start_own_keys`.
    """
    start_own_keys(engine)
    roll_call.listen()
    if isinstance(engine.basic_optimizer, BlockwiseOptimizer):
        run_on_all_ranks(
            lambda: UPSTREAM.check_instance(engine, engine.checkpoint_engine, engine.monitor), "building the engine"
        )


def detach(engine: Any) -> None:
    """Gives an engine's objects back the methods of DeepSpeed's that :func:`attach` has replaced, as for a benchmark.

    Training goes on as before, but for what those methods did: see ``blockwise-lr doctor``. Patches of the whole process
    stay.
    """
    parameters = [p for _, p in engine.module.named_parameters()]
    for owner in (engine, engine.optimizer, engine.checkpoint_engine, engine.monitor, *parameters):
        undo_instance(owner)


def _is_zero(wrapper: Any) -> bool:
    return any(is_a(wrapper, kind) for kind in (ZERO12, ZERO3, BF16))


def _save_for_any_layout(engine: Any, optimizer: BlockwiseOptimizer) -> None:
    """Universal checkpoints load through this package, and what ZeRO notes of its flat tensors is right."""
    wrapper = engine.optimizer
    if not _is_zero(wrapper):
        if engine.load_universal_checkpoint():
            raise BlockError(
                "load_universal needs a ZeRO stage of 1 to 3, for DeepSpeed makes universal checkpoints of "
                "these only; set zero_optimization, or unset checkpoint.load_universal"
            )
        return
    correct_mappings(wrapper, optimizer)
    upstream = wrapper._load_universal_checkpoint

    def load(checkpoint_folder: str, load_optimizer_states: bool, load_from_fp32_weights: bool, *_: Any) -> None:
        if load_optimizer_states:
            load_universal(wrapper, optimizer, checkpoint_folder)
        elif is_a(wrapper, ZERO3):  # DeepSpeed before 0.19.3 loads the states all the same
            load_weights(wrapper, optimizer, UniversalFolder(checkpoint_folder))
        else:
            upstream(checkpoint_folder, load_optimizer_states, load_from_fp32_weights)

    UNIVERSAL_LOADS.apply(wrapper, _load_universal_checkpoint=load)


def _divide_loss(engine: Any) -> None:
    """Divides the loss by gradient_accumulation_steps in place of the gradients at each of the model's outputs."""
    upstream = engine.backward

    def backward(loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        if scale_wrt_gas:
            loss = loss / engine.gradient_accumulation_steps()
        return upstream(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    ONE_DIVISION.apply(engine, backward=backward)


def _report_to_monitor(engine: Any, optimizer: BlockwiseOptimizer) -> None:
    """Adds each block type's learning rate to what the engine writes to TensorBoard and its other monitors."""
    write = engine.monitor.write_events

    def write_events(event_list: list[tuple[str, Any, int]]) -> None:
        if any(name == "Train/Samples/lr" for name, *_ in event_list):
            rates = optimizer.block_lrs()[0]
            event_list = [
                *event_list,
                *((f"Train/Samples/lr_{block}", lr, engine.global_samples) for block, lr in rates.items()),
            ]
        write(event_list)

    LEARNING_RATES.apply(engine.monitor, write_events=write_events)
