"""From Megatron's optimizer settings to an optimizer of ours inside Megatron's own wrapper."""
from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..blocks import BlockError, BlockMap
from ..optim.base import BlockwiseOptimizer
from ..optim.settings import group_lr
from .checkpoint import save_for_any_layout
from .mapping import ChunkMaps, map_chunks
from .settings import KINDS, BlockSettings
from .shard_maps import shard_map

_live: weakref.WeakSet[BlockwiseOptimizer] = weakref.WeakSet()


def build(original: Callable[..., Any], settings: BlockSettings, config: Any, model_chunks: Sequence[torch.nn.Module],
          param_groups: list[dict], **arguments: Any) -> Any:
    """What Megatron's ``_get_megatron_optimizer_based_on_param_groups`` makes, with our optimizer where its Adam would be.

    Args:
        original: that function.
        settings: ours.
        config, model_chunks, param_groups, arguments: as Megatron passes them.

    Raises:
        BlockError: an option that cannot go with ours, or a parameter that no rule maps; on every rank.
    """
    _refuse_unsupported(config, model_chunks)
    if config.optimizer in KINDS:
        config = copy.copy(config)
        config.optimizer = "adam"
    maps = map_chunks(model_chunks, rules=settings.block_rules, strict=settings.block_strict)
    with _in_place_of_adam(_factory(settings, maps.ours)):
        wrapper = original(config=config, model_chunks=model_chunks, param_groups=param_groups, **arguments)
    if isinstance(wrapper.optimizer, BlockwiseOptimizer):
        _attach(wrapper, maps, settings)
    return wrapper


def _factory(settings: BlockSettings, block_map: BlockMap) -> Callable[..., BlockwiseOptimizer]:
    def make(params: list[dict], lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
             **_: Any) -> BlockwiseOptimizer:
        return KINDS[settings.kind](params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block_map=block_map,
                                    block_lr_ratios=settings.block_lr_ratios or None,
                                    block_weight_decay=settings.block_weight_decay or None, kernel=settings.kernel,
                                    accept_mismatch=settings.accept_mismatch,
                                    ratio_fade_steps=settings.ratio_fade_steps)
    return make


@contextmanager
def _in_place_of_adam(factory: Callable[..., BlockwiseOptimizer]) -> Iterator[None]:
    """While Megatron builds one optimizer: its fused Adam is our factory."""
    from megatron.core import optimizer as module

    adam, is_torch = module.Adam, module.USING_PYTORCH_OPTIMIZER
    module.Adam, module.USING_PYTORCH_OPTIMIZER = factory, False
    try:
        yield
    finally:
        module.Adam, module.USING_PYTORCH_OPTIMIZER = adam, is_torch


def _attach(wrapper: Any, maps: ChunkMaps, settings: BlockSettings) -> None:
    """Tells the optimizer what Megatron's wrapper has put into it, and makes its state.

    The state, step included, has to be there before a checkpoint is loaded: DistributedOptimizer.state_dict asserts one
    common step over it, and is called before loading.
    """
    optimizer = wrapper.optimizer
    optimizer.attach_shards(shard_map(wrapper, maps.ours, row_parallel_sums=settings.row_parallel_sums))
    optimizer.blocks_everywhere = tuple(maps.stages.block_numel())
    for group in optimizer.param_groups:
        group["group_decay"] = not settings.block_weight_decay  # Megatron's own rule of what decays, unless told else
        for tensor in group["params"]:
            optimizer.init_state(tensor)
    save_for_any_layout(wrapper, optimizer, maps.recorded, settings.row_parallel_sums)
    _live.add(optimizer)


def current_block_lrs() -> dict[str, float]:
    """Block type -> learning rate now, over all pipeline stages; empty where no optimizer is ours."""
    for optimizer in _live:
        for group in optimizer.param_groups:
            return {block.value: group_lr(group, block) for block in optimizer.blocks_everywhere}
    return {}


def _refuse_unsupported(config: Any, model_chunks: Sequence[torch.nn.Module]) -> None:
    options = {
        "optimizer_cpu_offload": "--optimizer-cpu-offload",
        "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
        "optimizer_cuda_graph": "--optimizer-cuda-graph",
        "decoupled_lr": "--decoupled-lr (use --block-lr-ratios embedding=… head=…)",
    }
    for name, flag in options.items():
        if getattr(config, name, None):
            raise BlockError(f"blockwise optimizers do not support {flag}; leave it out")
    if not getattr(config, "decoupled_weight_decay", True):
        raise BlockError("blockwise optimizers decouple weight decay from the gradient; leave out "
                         "--no-decoupled-weight-decay")
    if getattr(getattr(model_chunks[0], "ddp_config", None), "use_megatron_fsdp", False):
        raise BlockError("blockwise optimizers do not support Megatron-FSDP; use --use-distributed-optimizer")
