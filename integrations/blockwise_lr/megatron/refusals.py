"""What of Megatron cannot go with optimizers of ours, and what must be so once they are built; each in one sentence.

Megatron's features that hand the inner optimizer other tensors than float32 shards of whole parameters, or that step it by
other ways than ``step()``, are refused by the name of their flag when the optimizer is built, on every rank alike. What is
built is then compared with what was asked for, so that a feature that is not on this list cannot be trained wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from ..blocks import PRESETS, BlockError, BlockMap
from ..blocks.presets import preset_of
from ..collective.agreement import find_difference
from ..optim.base import BlockwiseOptimizer
from .settings import KINDS, BlockSettings

# OptimizerConfig's field -> the flag, and what to do
_OPTIONS = {
    "optimizer_cpu_offload": "--optimizer-cpu-offload; leave it out",
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer; leave it out",
    "optimizer_cuda_graph": "--optimizer-cuda-graph; leave it out",
    "decoupled_lr": "--decoupled-lr; leave it out and use --block-lr-ratios embedding=… head=…",
    "use_layer_wise_distributed_optimizer": "the layer-wise distributed optimizer; use --use-distributed-optimizer",
    "overlap_param_gather_with_optimizer_step": "--overlap-param-gather-with-optimizer-step; leave it out",
    "reuse_grad_buf_for_mxfp8_param_ag": "--reuse-grad-buf-for-mxfp8-param-ag; leave it out",
}
_FLOAT32 = {
    "main_grads_dtype": "--main-grads-dtype",
    "main_params_dtype": "--main-params-dtype",
    "exp_avg_dtype": "--exp-avg-dtype",
    "exp_avg_sq_dtype": "--exp-avg-sq-dtype",
}
# DistributedDataParallelConfig's field -> the same
_WRAPPERS = {
    "use_megatron_fsdp": "Megatron-FSDP (--use-megatron-fsdp); use --use-distributed-optimizer",
    "use_custom_fsdp": "Megatron-FSDP (--use-custom-fsdp); use --use-distributed-optimizer",
    "fp8_param_gather": "--fp8-param-gather; leave it out, and --fp8-format may stay",
    "fp4_param_gather": "--fp4-param-gather; leave it out, and --fp4-format may stay",
}
# TransformerConfig's field -> the same, where it is not 1
_SIZES = {
    "gtp_weight_remat_size": "generalized tensor parallelism (--gtp-weight-remat-size); use --tensor-model-parallel-size",
    "expert_gtp_weight_remat_size": "generalized tensor parallelism of experts; use --expert-tensor-parallel-size",
}


def refuse_unsupported(config: Any, chunks: Sequence[torch.nn.Module], arguments: Mapping[str, Any]) -> None:
    """Refuses Megatron's features that cannot go with optimizers of ours, before anything is built.

    Args:
        config: the OptimizerConfig.
        chunks: this rank's model chunks as Megatron has wrapped them.
        arguments: what else ``_get_megatron_optimizer_based_on_param_groups`` was given.

    Raises:
        BlockError: one is asked for; it names the flag and what to do.
    """
    _refuse(config, _OPTIONS)
    for name, flag in _FLOAT32.items():
        if getattr(config, name, torch.float32) != torch.float32:
            raise BlockError(f"blockwise optimizers do not support {flag} other than fp32; leave it out")
    if not getattr(config, "decoupled_weight_decay", True):
        raise BlockError(
            "blockwise optimizers decouple weight decay from the gradient; leave out --no-decoupled-weight-decay"
        )
    for chunk in chunks:
        _refuse(getattr(chunk, "ddp_config", None), _WRAPPERS)
        _refuse(get_model_config(chunk), _SIZES, usual=1)
        _refuse_other_tensors(chunk)
    if arguments.get("skip_megatron_wrapping"):
        raise BlockError(
            "blockwise optimizers do not support the layer-wise distributed optimizer; use --use-distributed-optimizer"
        )
    _refuse_other_groups(arguments.get("pg_collection"))


def refuse_mup_twice(settings: BlockSettings, chunks: Sequence[torch.nn.Module]) -> None:
    """Refuses presets that scale rates by width where Megatron's own muP has done so already.

    Raises:
        BlockError: both are asked for.
    """
    name = preset_of(settings.block_lr_ratios)
    if name is not None and PRESETS[name].wanted and getattr(get_model_config(chunks[0]), "use_mup", False):
        raise BlockError(
            f"--use-mup and the preset {name} of --block-lr-ratios both scale learning rates by width; leave one of them out"
        )


def _refuse(config: Any, flags: Mapping[str, str], usual: int | None = None) -> None:
    for name, flag in flags.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and value != usual:
            raise BlockError(f"blockwise optimizers do not support {flag}")


def _refuse_other_tensors(chunk: torch.nn.Module) -> None:
    """Parameters that are no plain tensors: shards of FSDP2 (DTensor), or quantized weights."""
    for name, p in chunk.named_parameters():
        kind = type(p.data)
        if p.requires_grad and kind is not torch.Tensor:
            mend = (
                "leave out --use-torch-fsdp2 or Megatron-FSDP and use --use-distributed-optimizer"
                if kind.__name__ == "DTensor"
                else "leave out --fp8-param-gather or whatever makes it so"
            )
            raise BlockError(
                f"blockwise optimizers do not support Megatron models whose parameters are of type "
                f"{kind.__name__} ({name} in {type(chunk).__name__}); {mend}"
            )


def _refuse_other_groups(collection: Any) -> None:
    """Process groups of a caller's own: the shapes and names of a model are made whole with parallel_state's."""
    for name, get in (
        ("tp", parallel_state.get_tensor_model_parallel_group),
        ("pp", parallel_state.get_pipeline_model_parallel_group),
    ):
        group = getattr(collection, name, None)
        if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(get()):
            raise BlockError(
                f"blockwise optimizers know the process groups of megatron.core.parallel_state only, and "
                f"the pg_collection has another {name} group; build the model on parallel_state's"
            )


def refuse_other_settings(config: Any, settings: BlockSettings) -> None:
    """Compares what must be equal on all ranks, in one exchange over all of them.

    Raises:
        BlockError: on every rank, if a setting differs on any.
    """
    names = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps")
    mine = {
        **{name: _plain(getattr(config, name, None)) for name in names},
        **{field.name: _plain(getattr(settings, field.name)) for field in fields(settings)},
    }
    difference = find_difference(mine)
    if difference is not None:
        raise BlockError(
            f"{difference.place} is {difference.told(lambda value: value[:200])}; "
            f"start all ranks with the same flags, settings and rules"
        )


def _plain(value: Any) -> str:
    """A setting as text that is the same in every process: without orders of sets and addresses of functions."""
    if isinstance(value, Mapping):
        value = dict(sorted(value.items()))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def refuse_cut_heads(settings: BlockSettings, block_map: BlockMap) -> None:
    """Adam-mini, where more tensor-parallel ranks than query groups share heads.

    Raises:
        BlockError: edges of tensor-parallel slices cut heads; on all ranks, for all slices are of one size.
    """
    cut = [name for name, layout in block_map.items() if any(piece.unit is None for piece in layout.pieces)]
    if cut and KINDS[settings.kind].rule.segment_state is not None:
        raise BlockError(
            f"Adam-mini has one second moment per head, and tensor parallelism cuts the heads of {cut[0]}; use "
            f"a tensor-parallel size up to the number of query groups, or --optimizer blockwise_adamw"
        )


def ours_in(wrapper: Any, settings: BlockSettings) -> BlockwiseOptimizer | None:
    """The optimizer of ours inside what Megatron has built; None where this rank has nothing to train.

    Raises:
        BlockError: Megatron has built another one.
    """
    inner = getattr(wrapper, "optimizer", None)
    if inner is None:
        return None
    if type(inner) is not KINDS[settings.kind]:
        raise BlockError(
            f"Megatron built {type(inner).__module__}.{type(inner).__name__} where {settings.kind} was asked "
            f"for; install a megatron-core that the patches were written for (see `blockwise-lr doctor`)"
        )
    return inner


def check_tensors(optimizer: torch.optim.Optimizer, flats: Iterable[tuple[torch.Tensor, torch.Tensor, int]]) -> None:
    """That the inner optimizer's tensors are the float32 shards that are expected of Megatron's wrapper, one by one.

    Args:
        flats: (tensor, the model parameter it is a part of, how many elements it should have).

    Raises:
        BlockError: a tensor of another type or size, one too many or one missing.
    """
    expected = set()
    for flat, param, numel in flats:
        expected.add(id(flat))
        if type(flat.data) is not torch.Tensor or flat.dtype != torch.float32 or flat.numel() != numel:
            raise BlockError(
                f"Megatron gave the optimizer a {flat.dtype} {type(flat.data).__name__} of {flat.numel()} elements for a "
                f"parameter of shape {tuple(param.shape)}, where a plain float32 tensor of {numel} elements was expected; "
                f"leave out the flag that changes how parameters are stored"
            )
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    if held != expected:
        raise BlockError(
            f"Megatron's optimizer holds {len(held - expected)} tensors that are no known part of a parameter "
            f"and lacks {len(expected - held)}; leave out the flag that changes how parameters are stored"
        )
