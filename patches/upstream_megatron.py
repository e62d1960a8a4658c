"""What is read of Megatron: declarations, and typed views of what its optimizers hold.

The views are the only place that knows by which names Megatron's optimizers keep shards, ranges and gradient buffers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .symbols import Attributes, PatchError, Symbol, symbols
from .upstream import Upstream

PACKAGE, VERSIONS = "megatron-core", ">=0.15,<0.20"
DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
FLOAT16 = "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params"
FLOAT32 = "megatron.core.optimizer.optimizer:FP32Optimizer"
_BUFFER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer"
_BUCKET = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucket"
_CONFIG = "megatron.core.optimizer.optimizer_config:OptimizerConfig"
_DDP_CONFIG = "megatron.core.distributed:DistributedDataParallelConfig"
_MODEL_CONFIG = "megatron.core.model_parallel_config:ModelParallelConfig"
_GLOBALS = "megatron.training.global_vars"

_READS = (
    *symbols(_CONFIG, "optimizer", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps"),
    *symbols(
        _CONFIG,
        "optimizer_cpu_offload",
        "use_precision_aware_optimizer",
        "decoupled_lr",
        "overlap_param_gather_with_optimizer_step",
        "reuse_grad_buf_for_mxfp8_param_ag",
        "main_grads_dtype",
        "main_params_dtype",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
        "decoupled_weight_decay",
        why="features that are refused",
    ),
    *symbols(_CONFIG, "lion_beta1", "lion_beta2", why="Lion's betas", versions=">=0.19"),
    *symbols(_CONFIG, "optimizer_cuda_graph", "use_layer_wise_distributed_optimizer", why="refused", versions=">=0.19"),
    *symbols(_DDP_CONFIG, "use_megatron_fsdp", "use_custom_fsdp", "fp8_param_gather", why="features that are refused"),
    *symbols(_DDP_CONFIG, "fp4_param_gather", why="refused", versions=">=0.19"),
    *symbols(_MODEL_CONFIG, "gtp_weight_remat_size", "expert_gtp_weight_remat_size", why="refused", versions=">=0.19"),
    *symbols("megatron.core.utils", "get_model_config", why="head counts"),
    *symbols(
        "megatron.core.parallel_state",
        "get_pipeline_model_parallel_group",
        "get_tensor_model_parallel_group",
        "get_expert_tensor_parallel_group",
        "get_tensor_model_parallel_world_size",
        "get_tensor_model_parallel_rank",
        "model_parallel_is_initialized",
        why="names and shapes over all ranks",
    ),
    Symbol(DISTRIBUTED + "._get_model_param_range_map", ("self", "param"), why="which part of a parameter a shard is"),
)

_INSTANCES = (
    Attributes(
        DISTRIBUTED,
        (
            "optimizer",
            "model_fp32_groups",
            "shard_fp32_groups",
            "model_float16_groups",
            "shard_fp32_from_float16_groups",
            "buffers",
        ),
        why="which part of which parameter each shard is",
    ),
    Attributes(DISTRIBUTED, ("model_param_group_index_map",), why="a parameter's shard, for checkpoints"),
    Attributes(
        FLOAT16,
        ("optimizer", "float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups"),
        why="the fp32 copy of each parameter",
    ),
    Attributes(FLOAT32, ("optimizer",), why="the inner optimizer"),
    Attributes(_BUFFER, ("data_parallel_group", "buckets", "param_index_map"), why="where shards end"),
    Attributes(_BUCKET, ("grad_data", "params_list", "offset"), why="where shards end"),
)

UPSTREAM = Upstream(
    name="megatron-reads",
    package=PACKAGE,
    versions=VERSIONS,
    reads=_READS,
    instances=_INSTANCES,
    why="which part of which parameter an optimizer holds is in no interface of Megatron's",
    until="Megatron tells an optimizer what its shards are parts of",
)
TRAINING = Upstream(
    name="megatron-training-reads",
    package=PACKAGE,
    versions=VERSIONS,
    needs="megatron.training",
    reads=(Symbol(_GLOBALS + ":_GLOBAL_ARGS", why="what --optimizer and our flags were parsed to"),),
    why="get_args asserts where nothing was parsed, which is no error for library users",
    until="Megatron hands its parsed arguments to get_megatron_optimizer",
)


@dataclass(frozen=True)
class Part:
    """One tensor of the inner optimizer: ``size`` elements of a model parameter, from element ``start`` on."""

    tensor: torch.Tensor
    parameter: torch.Tensor
    start: int
    size: int


@dataclass(frozen=True)
class BucketedParameter:
    """Where a parameter lies in a gradient buffer's bucket, which is cut evenly over the ranks of a group.

    Attributes:
        parameter: the model's.
        start: its first element, counted from the bucket's.
        numel: how many elements it has.
        shard: elements of the bucket per rank.
        group: the ranks.
    """

    parameter: torch.Tensor
    start: int
    numel: int
    shard: int
    group: Any


def is_distributed(wrapper: Any) -> bool:
    """Whether Megatron's optimizer is its DistributedOptimizer, which cuts parameters over data-parallel ranks."""
    return isinstance(wrapper, Symbol(DISTRIBUTED).value())


def parts_of(wrapper: Any) -> list[Part] | None:
    """What the inner optimizer of one of Megatron's holds, tensor by tensor; None for a class that is not known.

    Raises:
        PatchError: it lacks an attribute in which that is kept.
    """
    UPSTREAM.check_instance(wrapper)
    if is_distributed(wrapper):
        groups = (
            *zip(wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
            *zip(wrapper.model_float16_groups, wrapper.shard_fp32_from_float16_groups),
        )
        pairs = (pair for models, shards in groups for pair in zip(models, shards))
        ranges = ((param, shard, wrapper._get_model_param_range_map(param)["param"]) for param, shard in pairs)
        return [Part(shard, param, part.start, part.size) for param, shard, part in ranges]
    if isinstance(wrapper, Symbol(FLOAT16).value()):
        copies = [
            (main, param)
            for params, mains in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups)
            for param, main in zip(params, mains)
        ]
        copies += [(param, param) for group in wrapper.fp32_from_fp32_groups for param in group]
        return [Part(main, param, 0, param.numel()) for main, param in copies]
    if isinstance(wrapper, Symbol(FLOAT32).value()):
        own = (param for group in wrapper.optimizer.param_groups for param in group["params"])
        return [Part(param, param, 0, param.numel()) for param in own]
    return None


def bucketed_parameters(wrapper: Any) -> Iterator[BucketedParameter]:
    """Every parameter in the gradient buffers of a DistributedOptimizer.

    Raises:
        PatchError: a buffer or bucket lacks an attribute in which that is kept.
    """
    for buffer in wrapper.buffers:
        UPSTREAM.check_instance(buffer, *buffer.buckets)
        for bucket in buffer.buckets:
            shard = bucket.grad_data.numel() // buffer.data_parallel_group.size()
            for param in bucket.params_list:
                start, end, *_ = buffer.param_index_map[param]
                yield BucketedParameter(param, start - bucket.offset, end - start, shard, buffer.data_parallel_group)


def global_arguments() -> Any:
    """What megatron.training has parsed; None where it is not in use or has parsed nothing yet.

    Raises:
        PatchError: it no longer keeps that where it did, so that ``--optimizer`` cannot be read.
    """
    module = sys.modules.get(_GLOBALS)
    if module is None:
        return None
    if not hasattr(module, "_GLOBAL_ARGS"):
        raise PatchError(
            f"{_GLOBALS} has no _GLOBAL_ARGS any more ({PACKAGE} {TRAINING.installed_version()} is installed), so that "
            f"--optimizer cannot be read; install an unchanged {PACKAGE}{VERSIONS}, or a newer blockwise-lr"
        )
    return module._GLOBAL_ARGS
