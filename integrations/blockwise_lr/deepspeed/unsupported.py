"""DeepSpeed features that our optimizers cannot serve: refused before the first collective, with the way out."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineModule

from ..blocks import BlockError
from ..blocks.marks import marks_of
from ..optim import CLASSES
from ..patches.deepspeed_variants import (
    ADDS_UP_IN_STAGE_2,
    AVERAGES_TOO_EARLY,
    FLOAT32_ACCUMULATION,
    LOADS_BF16_WITHOUT_ZERO,
    OFFLOADED_MICRO_BATCHES,
    PACKAGE,
    PRECISION,
)
from ..patches.symbols import installed_version
from .stages import map_engine_module


def refuse_unsupported(config: Any, module: torch.nn.Module, optimizer: Any, mesh_device: Any) -> None:
    """Refuses what would be wrong or fail later on.

    Args:
        config: a DeepSpeedConfig.
        module: the model as the user made it.
        optimizer: the client's optimizer; None where the ds_config names one of ours.
        mesh_device: the mesh that DeepSpeed made of ``mesh_param``, or None.

    Raises:
        BlockError: the first feature that is not supported.
    """
    zero = config.zero_config
    _refuse_partitioned(module, zero.stage)
    if zero.elastic_checkpoint:
        raise BlockError(
            "blockwise optimizers do not support elastic_checkpoint; remove it, and use universal "
            "checkpoints to change the number of ranks"
        )
    if getattr(zero, "zenflow", None) is not None:
        raise BlockError(
            "blockwise optimizers do not support zero_optimization.zenflow, which steps parts of the "
            "parameters with an AdamW of its own; remove it"
        )
    if (getattr(zero, "mics_shard_size", -1) or -1) > 0:  # DeepSpeed before 0.19.6; later ones refuse it themselves
        raise BlockError(
            f"blockwise optimizers do not support zero_optimization.mics_shard_size (MiCS, here {zero.mics_shard_size}), "
            f"which cuts parameters over a part of the ranks; remove it, or use zero_hpz_partition_size"
        )
    _refuse_nvme(zero)
    _refuse_offload(zero.offload_optimizer if zero.stage else None)
    _refuse_lost_gradients(config)
    _refuse_float32_accumulation(config, module)
    _refuse_lost_states(config)
    precision = PRECISION.here(config)
    for section, key in (
        ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):
        if precision[section].get(key):
            raise BlockError(
                f"blockwise optimizers step float32 master weights and do not support {section}.{key}; remove it"
            )
    if mesh_device is not None and mesh_device["sequence_parallel"].size() > 1:
        raise BlockError(
            "DeepSpeed leaves the sequence-parallel ranks of mesh_param (and of sequence_parallel_size) out "
            "of its gradient averages and its checkpoints; give deepspeed.initialize an mpu such as "
            "deepspeed.runtime.sequence_parallel.parallel_state_sp instead"
        )
    _refuse_autotp(config, module, optimizer)


def _refuse_partitioned(module: torch.nn.Module, stage: int) -> None:
    """Stages 0 to 2 would train the empty tensors that zero.Init leaves in place of the weights."""
    if stage == 3:
        return
    name = next((name for name, p in module.named_parameters() if marks_of(p).shape is not None), None)
    if name is not None:
        raise BlockError(
            f"{name} was made under deepspeed.zero.Init, which leaves its elements with ZeRO stage 3, and "
            f"zero_optimization.stage is {stage}; set stage 3, or make the model outside of zero.Init "
            f"(transformers enters it while a TrainingArguments or HfDeepSpeedConfig of stage 3 is alive)"
        )


def _refuse_nvme(zero: Any) -> None:
    """Tensors that lie on a disk: neither their values nor the low precision beside them can be read where they are."""
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):  # the stages that have it
        offload = getattr(zero, name) if zero.stage >= least else None
        if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
            raise BlockError(f'blockwise optimizers do not support {name} to nvme; use "device": "cpu"')


def _refuse_offload(offload: Any) -> None:
    if offload is None:
        return
    if getattr(offload, "super_offload", False):
        raise BlockError(
            "blockwise optimizers do not support offload_optimizer.super_offload, which steps with an "
            "AdamW of its own; remove it"
        )
    if offload.ratio < 1.0:
        raise BlockError(
            "blockwise optimizers do not support a partial offload_optimizer (ratio below 1), which steps "
            'the rest with another optimizer; set "ratio": 1.0'
        )


def _refuse_lost_gradients(config: Any) -> None:
    """What DeepSpeed before 0.19 trains wrongly with any optimizer: it loses gradients of micro batches on their way to the
    CPU, in ZeRO-1 and 2."""
    most, asked = OFFLOADED_MICRO_BATCHES.here, config.gradient_accumulation_steps
    if config.zero_config.stage in (1, 2) and config.zero_config.offload_optimizer and most and asked > most:
        raise BlockError(
            f"DeepSpeed {installed_version(PACKAGE)} loses gradients where offload_optimizer in ZeRO stage 1 or 2 goes with "
            f"more than {most} gradient_accumulation_steps, and {asked} are asked for; install deepspeed>=0.19, use stage 3, "
            f"or larger micro batches"
        )
    if config.zero_config.stage == 2 and asked > 1 and not ADDS_UP_IN_STAGE_2.here:
        raise BlockError(
            f"DeepSpeed {installed_version(PACKAGE)} steps ZeRO stage 2 on the gradients of the last micro batch alone, and "
            f"{asked} gradient_accumulation_steps are asked for; install deepspeed>=0.18.4, use stage 1 or 3, or larger micro "
            f"batches"
        )


def _refuse_float32_accumulation(config: Any, module: torch.nn.Module) -> None:
    """bf16 in ZeRO-1 with grad_accum_dtype fp32 in DeepSpeed 0.17.6 to 0.18.9: no optimizer trains right with it, or none is
    saved. A pipeline adds up before it averages."""
    wrong, bf16 = FLOAT32_ACCUMULATION.here, PRECISION.here(config)["bf16"]
    float32 = config.grad_accum_dtype in ("fp32", "float32", "float", "torch.float32")
    asked = bf16["enabled"] and config.zero_config.stage == 1 and float32
    if wrong is None or not asked or config.zero_config.offload_optimizer:
        return
    if wrong is not AVERAGES_TOO_EARLY:
        raise BlockError(
            f"DeepSpeed {installed_version(PACKAGE)} cannot save ZeRO stage 1 in bf16 with data_types.grad_accum_dtype "
            f"{config.grad_accum_dtype}; install deepspeed>=0.19, use stage 2 or 3, or leave grad_accum_dtype out"
        )
    if not bf16["immediate_grad_update"] and not isinstance(module, PipelineModule):
        raise BlockError(
            f"DeepSpeed {installed_version(PACKAGE)} leaves the last micro batch out of its averages over the ranks in ZeRO "
            f"stage 1 in bf16 with data_types.grad_accum_dtype {config.grad_accum_dtype}; set bf16.immediate_grad_update, or "
            f"install deepspeed>=0.19"
        )


def _refuse_lost_states(config: Any) -> None:
    """bf16 without ZeRO in DeepSpeed 0.18.0 to 0.18.5, which saves an optimizer's state and does not load it again."""
    if PRECISION.here(config)["bf16"]["enabled"] and not config.zero_config.stage and not LOADS_BF16_WITHOUT_ZERO.here:
        raise BlockError(
            f"DeepSpeed {installed_version(PACKAGE)} does not load the optimizer's state of a checkpoint in bf16 without "
            f"ZeRO; set zero_optimization.stage to 1, or install deepspeed>=0.18.6"
        )


def _refuse_autotp(config: Any, module: torch.nn.Module, optimizer: Any) -> None:
    if (getattr(config.tensor_parallel_config, "autotp_size", 0) or 0) < 2:
        return
    if optimizer is not None:
        raise BlockError(
            "tensor_parallel.autotp_size cuts parameters after an optimizer object was built, whose block "
            "map is then of other shapes; name the optimizer in the ds_config instead"
        )
    kind = CLASSES.get(config.optimizer_name)
    if kind is not None and kind.rule.whole_matrices:
        raise BlockError(
            f"{kind.__name__} does not support tensor_parallel.autotp_size: DeepSpeed does not mark which slices make a "
            "matrix together; use BlockwiseAdamW, or remove tensor_parallel"
        )
    if kind is not None and kind.rule.segment_state is not None:
        raise BlockError(
            f"{kind.__name__} does not support tensor_parallel.autotp_size: the slices hold parts of "
            "heads' and rows' segments, and DeepSpeed does not mark which; use BlockwiseAdamW, or remove "
            "tensor_parallel"
        )
    _refuse_fused(config, module)


def _refuse_fused(config: Any, module: torch.nn.Module) -> None:
    """AutoTP cuts fused weights in ways of its own, model by model, that no block map tells."""
    settings = config.optimizer_params or {}
    block_map = map_engine_module(module, settings.get("block_rules"), settings.get("block_strict", True))
    for name, layout in block_map.items():
        if len(layout.blocks) > 1:
            types = ", ".join(block.value for block in layout.blocks)
            raise BlockError(
                f"{name} holds several block types ({types}), and "
                f"tensor_parallel.autotp_size cuts such weights in ways blockwise_lr cannot follow; use a "
                f"model with separate weights, or remove tensor_parallel"
            )
