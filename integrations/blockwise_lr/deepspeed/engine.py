"""What a DeepSpeed engine with one of our optimizers gets beyond it: shards, early sums, learning rates in the monitor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe.module import PipelineModule

from ..blocks import BlockError
from ..checkpoint.target import SavePolicy
from ..optim.attachment import Attachment
from ..optim.base import BlockwiseOptimizer
from ..optim.segmentwise import SegmentwiseOptimizer
from .agreement import compare_slices, is_callable
from .flats import correct_mappings
from .segment_sums_hook import prereduce_once_per_step
from .shard_maps import shard_map
from .stages import whole_model_map
from .state_access import serve_optimizer_states
from .universal import load_universal
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
    shards = shard_map(engine.optimizer, optimizer, engine.module, engine.mpu)
    is_pipeline = isinstance(engine.module, PipelineModule)
    whole_map = whole_model_map(optimizer.block_map) if is_pipeline else None
    optimizer.attach(Attachment(shards, SavePolicy(recorded_map=whole_map, collective_load=shards is not None)))
    if hasattr(engine.optimizer, "_link_all_hp_params"):  # ZeRO and BF16_Optimizer
        serve_optimizer_states(engine.optimizer, optimizer)
    if isinstance(optimizer, SegmentwiseOptimizer) and hasattr(engine.optimizer, "unscale_and_clip_grads"):
        if shards is not None and shards.boundaries and len(shards.flats) > 1:
            prereduce_once_per_step(engine.optimizer, optimizer)
    _save_for_any_layout(engine, optimizer)
    _report_to_monitor(engine, optimizer)


def _save_for_any_layout(engine: Any, optimizer: BlockwiseOptimizer) -> None:
    """Universal checkpoints load through this package, and what ZeRO notes of its flat tensors is right."""
    wrapper = engine.optimizer
    if not hasattr(wrapper, "_load_universal_checkpoint"):
        if engine.load_universal_checkpoint():
            raise BlockError(
                "load_universal needs a ZeRO stage of 1 to 3, for DeepSpeed makes universal checkpoints of "
                "these only; set zero_optimization, or unset checkpoint.load_universal"
            )
        return
    correct_mappings(wrapper, optimizer)
    upstream = wrapper._load_universal_checkpoint

    def load(checkpoint_folder: str, load_optimizer_states: bool, load_from_fp32_weights: bool) -> None:
        if load_optimizer_states:
            load_universal(wrapper, optimizer, checkpoint_folder)
        else:
            upstream(checkpoint_folder, load_optimizer_states, load_from_fp32_weights)

    wrapper._load_universal_checkpoint = load


def _report_to_monitor(engine: Any, optimizer: BlockwiseOptimizer) -> None:
    """Adds each block type's learning rate to what the engine writes to TensorBoard and its other monitors."""
    write: Callable[[list], None] = engine.monitor.write_events

    @functools.wraps(write)
    def write_events(events: list, *args: Any, **kwargs: Any) -> None:
        if any(name == "Train/Samples/lr" for name, *_ in events):
            events = [
                *events,
                *(
                    (f"Train/Samples/lr_{block}", lr, engine.global_samples)
                    for block, lr in optimizer.block_lrs()[0].items()
                ),
            ]
        write(events, *args, **kwargs)

    engine.monitor.write_events = write_events
