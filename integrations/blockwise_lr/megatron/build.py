"""From Megatron's optimizer settings to an optimizer of ours inside Megatron's own wrapper."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..blocks import BlockMap, BlockType
from ..blocks.layout import Rate
from ..collective.errors import is_rank_zero, run_on_all_ranks
from ..optim.attachment import Attachment
from ..optim.base import BlockwiseOptimizer
from ..optim.clipping import BlockClip, Gradient, gradients
from ..patches.megatron_optimizer import in_place_of_adam as _in_place_of_adam
from ..rules.base import UpdateRule
from ..rules.param_groups import LOWEST, block_lrs
from .checkpoint import save_for_any_layout, save_policy
from .mapping import ChunkMaps, map_chunks
from .muon import refuse_other_muons
from .refusals import ours_in, refuse_cut_heads, refuse_mup_twice, refuse_other_settings, refuse_unsupported
from .schedule import BlockSchedule
from .settings import KINDS, BlockSettings, megatron_arguments
from .shard_maps import shard_map

logger = logging.getLogger(__name__)


def build(
    original: Callable[..., Any],
    settings: BlockSettings,
    config: Any,
    model_chunks: Sequence[torch.nn.Module],
    param_groups: list[dict],
    **arguments: Any,
) -> Any:
    """What Megatron's ``_get_megatron_optimizer_based_on_param_groups`` makes, with our optimizer where its Adam would be.

    Args:
        original: that function.
        settings: ours.
        config, model_chunks, param_groups, arguments: as Megatron passes them.

    Raises:
        BlockError: an option that cannot go with ours, a parameter that no rule maps, settings that differ between ranks,
            or something else built than asked for; on every rank.
    """
    refuse_unsupported(config, model_chunks, arguments)
    refuse_other_settings(config, settings)
    refuse_other_muons(KINDS[settings.kind].rule, settings.block_muon, config)
    if config.optimizer in KINDS:
        config = copy.copy(config)
        config.optimizer = "adam"
    maps = map_chunks(model_chunks, rules=settings.block_rules, strict=settings.block_strict)
    refuse_cut_heads(settings, maps.ours)
    refuse_mup_twice(settings, model_chunks)
    rates = _rates_of_groups(param_groups, maps.ours)
    with _in_place_of_adam(_factory(settings, maps.ours, config)):
        wrapper = original(config=config, model_chunks=model_chunks, param_groups=param_groups, **arguments)
    optimizer = _attach(wrapper, maps, settings, rates)
    if optimizer is not None and optimizer.block_clip:
        experts = any(not getattr(p, "allreduce", True) for group in param_groups for p in group["params"])
        _clip_together(optimizer, model_chunks[0], experts)
    return wrapper


# Of each model (its first chunk), the optimizers of ours that Megatron chains: experts have one of their own. Process-wide, as
# Megatron builds them one after another and tells none of the others.
_chained: WeakKeyDictionary[torch.nn.Module, list[Any]] = WeakKeyDictionary()


def _clip_together(optimizer: BlockwiseOptimizer, first_chunk: torch.nn.Module, are_experts: bool) -> None:
    """Lets the optimizers that Megatron chains take the norms of block types over all of them; it has scaled and clipped the
    gradients of all before it steps the first."""
    if not are_experts:  # which come last
        _chained[first_chunk] = []
    peers = _chained.setdefault(first_chunk, [])
    found = weakref.ref(optimizer)

    def peer() -> tuple[BlockClip, list[Gradient]]:
        alive = found()
        assert alive is not None  # the optimizers of a chain live as long as it
        return alive.clip, gradients(alive.all_tensors())

    peers.append(peer)
    optimizer.clip.peers = peers


def _rates_of_groups(param_groups: Sequence[Mapping[str, Any]], block_map: BlockMap) -> list[tuple[Rate, ...]]:
    """What rates the parameters of each param group on any pipeline stage have; Megatron makes the same groups on all."""
    here = []
    for of in param_groups:
        layouts = [block_map[block_map.require_name(p)] for p in of["params"]]
        here.append({layout.rate(block) for layout in layouts for block in layout.blocks})
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[list[set[Rate]]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(stages, here, group=group)
    return [tuple(sorted(set().union(*same))) for same in zip(*stages)]


def _factory(settings: BlockSettings, block_map: BlockMap, config: Any) -> Callable[..., BlockwiseOptimizer]:
    """What is called as Megatron's Adam is."""
    kind = KINDS[settings.kind]

    def make(params: list[dict], lr: float, **given: Any) -> BlockwiseOptimizer:
        own = _rule_options(kind.rule, given, config)
        return kind(
            params,
            lr=lr,
            block_map=block_map,
            block_lr_ratios=settings.block_lr_ratios or None,
            block_weight_decay=settings.block_weight_decay or None,
            kernel=settings.kernel,
            accept_mismatch=settings.accept_mismatch,
            ratio_fade_steps=settings.ratio_fade_steps,
            block_clip=settings.block_clip or {},
            **(settings.block_muon or {}),
            **own,
        )

    return make


def _rule_options(rule: UpdateRule, given: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The rule's options among those that Megatron gives its Adam. Other optimizers' betas are their own: Megatron's
    ``lion_beta1`` and the like where it has them, and the rule's defaults where it has not, but never --adam-beta1."""
    names = [name for name in ("weight_decay", "eps") if name in given and name in rule.Options.model_fields]
    found: dict[str, Any] = {name: given[name] for name in names}
    if "eps" in found:
        return {**found, "betas": given["betas"]}
    betas = [getattr(config, f"{rule.name}_beta{number}", None) for number in (1, 2)]
    return found if None in betas else {**found, "betas": tuple(betas)}


def _attach(
    wrapper: Any, maps: ChunkMaps, settings: BlockSettings, rates: list[tuple[Rate, ...]]
) -> BlockwiseOptimizer | None:
    """Tells the optimizer what Megatron's wrapper has put into it, and makes its state.

    The state, step included, has to be there before a checkpoint is loaded: DistributedOptimizer.state_dict asserts one
    common step over it, and is called before loading.
    """

    def checked() -> tuple[BlockwiseOptimizer | None, Any]:
        optimizer = ours_in(wrapper, settings)
        if optimizer is None:
            return None, None
        return optimizer, shard_map(wrapper, maps.ours, row_parallel_sums=settings.row_parallel_sums)

    optimizer, shards = run_on_all_ranks(checked, "building the optimizer")
    if optimizer is None:
        return None
    schedule = BlockSchedule.checked(settings.block_schedule)
    optimizer.block_schedule = None if schedule is None else schedule.fitted(optimizer, megatron_arguments())
    policy = save_policy(wrapper, maps.recorded, settings.row_parallel_sums)
    optimizer.attach(Attachment(shards, policy, rates))
    for group in optimizer.param_groups:
        _set_decay(group, settings.block_weight_decay or {})
        for tensor in group["params"]:
            optimizer.init_state(tensor)
    save_for_any_layout(wrapper, optimizer)
    if is_rank_zero():
        logger.warning(optimizer.describe())  # of this stage's and slice's parameters; Megatron shows warnings only
    return optimizer


def _set_decay(group: dict[str, Any], stated: Mapping[Any, float]) -> None:
    """Megatron's rule of what decays (a group's ``wd_mult``), at the values that block_weight_decay states.

    Where a group does not decay, norms do if they are named: that is all that naming them can mean, for by Megatron's rule
    none decays but those of q and k under --apply-wd-to-qk-layernorm.
    """
    multiplier = float(group.get("wd_mult", 1.0))
    decays = {str(block): value for block, value in stated.items()}
    if not multiplier:
        decays = {block: value for block, value in decays.items() if block == BlockType.NORM.value}
    group["block_weight_decay"] = {block: value * (multiplier or 1.0) for block, value in decays.items()}
    group["decay_norms_and_biases"], group["group_decay"] = multiplier > 0, False


def optimizers_of(optimizer: Any) -> list[BlockwiseOptimizer]:
    """The blockwise optimizers inside what ``get_megatron_optimizer`` returned: one, or one more for experts; none where it
    is another kind."""
    inner = [getattr(part, "optimizer", None) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [found for found in inner if isinstance(found, BlockwiseOptimizer)]


def current_block_lrs(optimizer: Any) -> dict[str, list[float]]:
    """The learning rates that a Megatron optimizer uses now, over all pipeline stages.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned.

    Returns:
        Block type or own block -> its rates, one for each schedule that param groups with such parameters follow, in the
        order of the groups: one as a rule, two where --use-mup or config_overrides give some of them another peak. Where
        block rules scale them by layer, as for :meth:`BlockwiseOptimizer.block_lrs`. Empty where no optimizer is ours.
    """
    found: dict[str, dict[tuple, float]] = {block.value: {} for block in BlockType}
    for inner in optimizers_of(optimizer):
        for group, rates in zip(inner.param_groups, inner.rates_of_groups or ()):
            for block, lr in block_lrs(group, rates).items():
                ratio = group["block_lr_ratios"][block.removesuffix(LOWEST)]
                schedule = group.get("max_lr"), group.get("min_lr"), ratio
                found.setdefault(block, {}).setdefault(schedule, lr)
    return {block: list(rates.values()) for block, rates in found.items() if rates}
