"""What is read of DeepSpeed: declarations, and typed views of what its optimizers hold.

The views are the only place that knows by which names DeepSpeed's optimizers keep flat tensors, offsets and groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .deepspeed_variants import (
    BF16,
    ENGINE,
    FLAT_GRADIENTS,
    INSTANCES,
    PACKAGE,
    READS,
    REFUSED,
    STARTS,
    UNFUSED,
    VERSIONS,
    ZERO3,
    ZERO12,
)
from .symbols import Attributes, Symbol, symbols
from .upstream import Upstream

_CONFIG = "deepspeed.runtime.config:DeepSpeedConfig"

_READS = (
    *READS,
    *symbols(
        ENGINE,
        "load_universal_checkpoint",
        "use_node_local_storage",
        "bfloat16_enabled",
        "zero_optimization",
        "zero_optimization_partition_weights",
        "autotp_size",
        "optimizer_name",
        "optimizer_params",
        why="what kind of run it is",
    ),
    Symbol(ENGINE + "._get_zero_ckpt_name", ("self", "checkpoints_path", "tag")),
    Symbol(ENGINE + "._get_zero_param_shapes", ("self",), why="the order of parameters in flat tensors"),
    Symbol(ENGINE + "._copy_recovery_script", ("self", "save_path")),
    Symbol(ZERO12 + ".unscale_and_clip_grads", ("self", "grad_groups_flat", "total_norm"), why="the gradients' scale"),
    Symbol(ZERO3 + ".unscale_and_clip_grads", why="the gradients' scale; a decorator hides its signature"),
    *symbols(ZERO12, "loss_scale", why="the gradients' scale"),
    *symbols(ZERO3, "loss_scale", why="the gradients' scale"),
    *(Symbol(f"{path}._link_all_hp_params", ("self",)) for path in (ZERO12, BF16)),
    Symbol(ZERO3 + ".get_param_id", ("self", "param")),
    Symbol(ZERO3 + "._set_fp32_optimizer_param_groups", ("self",), why="loading a universal checkpoint in stage 3"),
    Symbol(ZERO3 + "._clear_fp32_optimizer_param_groups", ("self",), why="the same"),
    *symbols("deepspeed.pipe", "PipelineModule"),
    *symbols("deepspeed.runtime.pipe.module:PipelineModule", "mpu", "get_tied_weights_and_groups"),
    *symbols("deepspeed.runtime.checkpoint_engine.checkpoint_engine:CheckpointEngine", "save", "load"),
    *symbols("deepspeed.runtime.fp16.loss_scaler", "LossScaler", "DynamicLossScaler", why="unpickled from checkpoints"),
    *symbols("deepspeed.runtime.zero.config", "ZeroStageEnum", why="unpickled from checkpoints"),
    Symbol("deepspeed.utils.tensor_fragment:fragment_address", ("numel", "start")),
    Symbol("deepspeed.checkpoint.ds_to_universal:main", ("args",)),
    *symbols("deepspeed.comm", "get_rank", "get_world_size", "all_reduce"),
    *symbols("deepspeed.accelerator", "get_accelerator"),
)

_INSTANCES = (
    *INSTANCES,
    Attributes(
        _CONFIG,
        (
            "optimizer_name",
            "optimizer_params",
            "scheduler_name",
            "scheduler_params",
            "zero_config",
            "tensor_parallel_config",
            "gradient_clipping",
            "gradient_accumulation_steps",
            "communication_data_type",
            "grad_accum_dtype",
            "prescale_gradients",
            "gradient_predivide_factor",
        ),
        why="compared over the ranks; some are refused",
    ),
    Attributes(
        "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
        ("stage", "elastic_checkpoint", "offload_optimizer", "offload_param"),
        why="features that are refused",
    ),
    Attributes(
        "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
        ("device", "ratio"),
        why="features that are refused",
    ),
    Attributes("deepspeed.runtime.tensor_parallel.config:TPTrainingConfig", ("autotp_size",), why="refused"),
    Attributes(
        ENGINE,
        (
            "basic_optimizer",
            "optimizer",
            "module",
            "mpu",
            "mesh_device",
            "client_optimizer",
            "config",
            "_config",
            "monitor",
            "checkpoint_engine",
            "lr_scheduler",
            "seq_dp_world_size",
            "has_moe_layers",
        ),
        why="the run's parts",
    ),
    Attributes(
        ENGINE,
        (
            "global_steps",
            "global_samples",
            "micro_steps",
            "skipped_steps",
            "loaded_checkpoint_mp_world_size",
            "loaded_checkpoint_dp_world_size",
        ),
        why="put back where a load fails",
    ),
    Attributes(
        ZERO12,
        (
            "bit16_groups",
            "round_robin_bit16_groups",
            "single_partition_of_fp32_groups",
            "real_dp_process_group",
        ),
        why="which part of which parameter lies where",
    ),
    Attributes(ZERO12, ("round_robin_gradients",), why="DeepSpeed's links are put right"),
    Attributes(ZERO3, ("fp16_groups", "fp32_partitioned_groups_flat", "grad_position"), why="what lies where"),
    Attributes(ZERO3, ("fp16_partitioned_groups_flat", "fp16_partitioned_groups", "unflatten"), why="the same in bf16"),
    *(
        Attributes(of, ("averaged_gradients", "flatten", "clip_grad"), why="Adam-mini's sums of all param groups")
        for of in (ZERO12, ZERO3)
    ),
    *(
        Attributes(of, ("loss_scaler", "dynamic_loss_scale", "overflow"), why="loaded, and put back where that fails")
        for of in (ZERO12, ZERO3)
    ),
    Attributes(BF16, ("bf16_groups", "fp32_groups_flat_partition", "real_dp_process_group"), why="what lies where"),
    *(
        Attributes(of, ("_param_slice_mappings", "_hp_optimizer_states_linked"), why="DeepSpeed's links to states")
        for of in (ZERO12, BF16)
    ),
    Attributes(UNFUSED, ("fp16_groups", "fp32_groups"), why="the fp32 copy of each parameter"),
)
# what zero.Init and the stage 3 optimizer put on a parameter
_PARTITIONED = Attributes(
    "torch.nn:Parameter", ("ds_numel", "ds_shape", "ds_process_group", "partition_numel"), why="how stage 3 cuts it"
)
# what ZeRO-1 and 2 and BF16_Optimizer put on a parameter when they link it to their flat tensors
_LINKED = Attributes(
    "torch.nn:Parameter", ("_dp_group", "get_full_hp_param", "set_full_hp_param"), why="whole states of a parameter"
)

UPSTREAM = Upstream(
    name="deepspeed-reads",
    package=PACKAGE,
    versions=VERSIONS,
    reads=_READS,
    instances=_INSTANCES,
    why="which part of which parameter an optimizer holds is in no interface of DeepSpeed's",
    until="DeepSpeed tells an optimizer what its flat tensors are made of",
    refused=REFUSED,
)


@dataclass(frozen=True)
class PartitionedView:
    """ZeRO-1 and 2, and BF16_Optimizer: each group's parameters lie in one buffer, which is cut evenly over ranks.

    Attributes:
        groups: the model's parameters, group by group.
        flats: this rank's flat fp32 tensor of each group.
        process_groups: over which ranks each group's buffer is cut.
        offsets: of each group, id of a parameter -> where in the buffer it begins; None: one after another.
    """

    groups: Sequence[Sequence[torch.Tensor]]
    flats: Sequence[torch.Tensor]
    process_groups: Sequence[Any]
    offsets: Sequence[dict[int, int]] | None


@dataclass(frozen=True)
class Piece:
    """This rank's piece of a parameter that ZeRO-3 has cut.

    Attributes:
        parameter: the model's, whose tensor may be empty now.
        numel: elements of the whole parameter.
        size: elements of each rank's piece; the last ones' end, or all of it, is padding.
        offset: where in its flat tensor the piece begins.
        group: the ranks.
    """

    parameter: torch.Tensor
    numel: int
    size: int
    offset: int
    group: Any


@dataclass(frozen=True)
class Stage3View:
    """ZeRO-3: every parameter is cut evenly, and a rank's pieces are laid one after another.

    Attributes:
        flats: this rank's flat fp32 tensor of each sub group.
        pieces: what each of them holds.
    """

    flats: Sequence[torch.Tensor]
    pieces: Sequence[Sequence[Piece]]


@dataclass(frozen=True)
class UnfusedView:
    """fp16 or bf16 without ZeRO: (fp32 copy, the model's parameter), one by one."""

    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]


def view_of(wrapper: Any) -> PartitionedView | Stage3View | UnfusedView | None:
    """What a DeepSpeed optimizer holds of the model's parameters; None for a class that is not known.

    Raises:
        PatchError: it lacks an attribute in which that is kept.
    """
    UPSTREAM.check_instance(wrapper)
    if is_a(wrapper, ZERO3):
        UPSTREAM.refuse(_PARTITIONED.problem(p) for group in wrapper.fp16_groups for p in group)
        pieces = [[_piece(wrapper, parameter) for parameter in group] for group in wrapper.fp16_groups]
        return Stage3View(wrapper.fp32_partitioned_groups_flat, pieces)
    if is_a(wrapper, ZERO12):
        offsets = [
            dict(zip(map(id, group), starts))
            for group, starts in zip(wrapper.round_robin_bit16_groups, STARTS.here(wrapper))
        ]
        flats = wrapper.single_partition_of_fp32_groups
        return PartitionedView(wrapper.bit16_groups, flats, wrapper.real_dp_process_group, offsets)
    if is_a(wrapper, BF16):
        flats = wrapper.fp32_groups_flat_partition
        return PartitionedView(wrapper.bf16_groups, flats, wrapper.real_dp_process_group, None)
    if is_a(wrapper, UNFUSED):
        copies = (pair for pairs in zip(wrapper.fp32_groups, wrapper.fp16_groups) for pair in zip(*pairs))
        return UnfusedView(tuple(copies))
    return None


def waiting_gradients(wrapper: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(flat tensor, flat gradient) of every group of a ZeRO optimizer that is about to step the first of them: of that
    one, already in place; of the others, where they were averaged."""
    if is_a(wrapper, ZERO3):
        return [
            (flat, flat.grad if flat.grad is not None else wrapper.flatten(wrapper.averaged_gradients[number]))
            for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
        ]
    found = []
    for number, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        grad = flat.grad
        if grad is None:
            grad = FLAT_GRADIENTS.here(wrapper, number)
        if grad is None:
            grad = wrapper.flatten(wrapper.averaged_gradients[number])
        found.append((flat, grad))
    return found


def gradient_factor(wrapper: Any, total_norm: Any) -> float:
    """What a ZeRO optimizer is about to multiply gradients with, read off a 1 that goes through DeepSpeed's own scaling.

    Raises:
        PatchError: that scaling asks for more than it did.
    """
    probe = torch.ones(1, dtype=torch.float32)
    norm = total_norm.cpu() if isinstance(total_norm, torch.Tensor) else total_norm
    scale = type(wrapper).unscale_and_clip_grads
    if not is_a(wrapper, ZERO3):
        scale(wrapper, [probe], norm)
        return float(probe)
    stand_in = SimpleNamespace(
        loss_scale=wrapper.loss_scale,
        clip_grad=wrapper.clip_grad,
        fp32_partitioned_groups_flat=[SimpleNamespace(grad=probe)],
    )
    try:
        scale(stand_in, 0, norm)
    except AttributeError as error:
        UPSTREAM.refuse([f"{ZERO3}.unscale_and_clip_grads reads more than it did: {error}"])
    return float(probe)


def is_a(wrapper: Any, kind: str) -> bool:
    """Whether an object is an instance of one of this module's classes, such as ZERO3."""
    return isinstance(wrapper, Symbol(kind).value())


def _piece(wrapper: Any, parameter: Any) -> Piece:
    _, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    return Piece(parameter, parameter.ds_numel, parameter.partition_numel(), offset, parameter.ds_process_group)


def states_must_be_linked_anew(wrapper: Any) -> None:
    """Has DeepSpeed link parameters to their optimizer states again at the next step, after these have been loaded."""
    if is_a(wrapper, ZERO12) or is_a(wrapper, BF16):
        wrapper._hp_optimizer_states_linked = False


@torch.no_grad()
def copy_to_low_precision(wrapper: Any) -> None:
    """Gives the parameters of a ZeRO-3 optimizer the values of their fp32 copies, which have been loaded."""
    for flat, low, pieces in zip(
        wrapper.fp32_partitioned_groups_flat, wrapper.fp16_partitioned_groups_flat, wrapper.fp16_partitioned_groups
    ):
        low.copy_(flat)
        for piece, value in zip(pieces, wrapper.unflatten(low, pieces)):
            piece.data = value.data


def linked_group(parameter: torch.Tensor) -> Any:
    """The process group over which a linked parameter's states are cut.

    Raises:
        PatchError: DeepSpeed has not put on the parameter what is read of it.
    """
    UPSTREAM.refuse([_LINKED.problem(parameter)])
    return parameter._dp_group  # type: ignore[attr-defined]
