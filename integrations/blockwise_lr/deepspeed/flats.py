"""What lies where in a rank's flat tensors: recorded in a checkpoint, compared before a load, told to DeepSpeed's tools.

DeepSpeed's ZeRO saves flat tensors without names, and loads them by position. So a checkpoint belongs to the order in
which a run laid its parameters into flat tensors (their order of definition, ``round_robin_gradients``, ZeRO-3's
``sub_group_size``, ``parameter_alignment``): another run of the same model in another order would take one parameter's
values for another's.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xxhash
from deepspeed.utils.tensor_fragment import fragment_address

from ..blocks.block_map import plain_name
from ..checkpoint.manifest import Layout
from ..checkpoint.matching import merged
from ..optim.base import BlockwiseOptimizer
from ..patches.deepspeed_instances import STATE_PLACES
from ..patches.deepspeed_variants import BF16, HAS_RANKS_FILES, LINKING_TRUE_PLACES, ZERO12
from ..patches.upstream_deepspeed import is_a

# Key of what a file with optimizer state says about its flat tensors, beside DeepSpeed's own keys.
KEY = "blockwise_lr"
_SHARDINGS = {
    "DeepSpeedZeroOptimizer": "ZeRO-1 or 2",
    "DeepSpeedZeroOptimizer_Stage3": "ZeRO-3",
    "BF16_Optimizer": "BF16_Optimizer",
}
# settings that decide on the order or the cuts
_ORDERING = (
    "round_robin_gradients",
    "sub_group_size",
    "parameter_alignment",
    "zero_hpz_partition_size",
    "mics_shard_size",
)


def layout(engine: Any) -> Layout:
    """What two runs must share for one to load what the other saved, without conversion. Of this rank's file only."""
    sharding = next(
        (_SHARDINGS[kind.__name__] for kind in type(engine.optimizer).__mro__ if kind.__name__ in _SHARDINGS), "ZeRO-0"
    )
    held = contents(engine)
    return Layout(
        sharding=sharding,
        precision="bf16" if engine.bfloat16_enabled() else "fp32 or fp16",
        ranks="any number of" if sharding == "ZeRO-0" else engine.seq_dp_world_size,
        flats={} if held is None else {state_file(engine): digest(held)},
        order=[] if held is None else order(engine),
        settings=ordering_settings(engine.config),
    )


def contents(engine: Any) -> list[list[Any]] | None:
    """This rank's flat tensors as plain lists: [numel, [[name, start, numel, offset], ...]] of each; None where the
    optimizer holds the model's own parameters, whose states are loaded by name."""
    optimizer = engine.basic_optimizer
    if engine.optimizer is optimizer or optimizer.shards is None:
        return None
    return _held(optimizer, plain_name)


def _held(optimizer: BlockwiseOptimizer, called: Callable[[str], str]) -> list[list[Any]]:
    shards = optimizer.shards
    assert shards is not None, "asked of optimizers that a wrapper of DeepSpeed's has sharded"
    return [
        [flat.numel(), [list(f) for f in merged([(called(f.name), f.start, f.numel, f.offset) for f in fragments])]]
        for flat, fragments in shards.flats
    ]


def digest(held: list[list[Any]]) -> str:
    """A digest of :func:`contents`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(held).encode())


def order(engine: Any) -> list[str]:
    """The parameters' names in the order in which flat tensors hold them, over all ranks."""
    return [plain_name(name) for group in engine._get_zero_param_shapes() for name in group]


def state_file(engine: Any) -> str:
    """The name of the file that holds this rank's optimizer state."""
    path = engine._get_zero_ckpt_name("", "") if HAS_RANKS_FILES.here(engine) else engine._get_ckpt_name("", "")
    return os.path.basename(path)


def ordering_settings(ds_config: Any) -> dict[str, Any]:
    """What of a ds_config decides on the order."""
    zero = ds_config.get("zero_optimization") if isinstance(ds_config, Mapping) else None
    return {key: zero[key] for key in _ORDERING if key in zero} if isinstance(zero, Mapping) else {}


def difference(saved: Layout, now: Layout) -> str | None:
    """In what this rank's flat tensors differ from those its file was saved from, in words; None where they do not, or
    where it is not known."""
    if not saved.flats or not now.flats:
        return None
    name, found = next(iter(now.flats.items()))
    if saved.flats.get(name) == found:
        return None
    return order_difference(saved.order, now.order) or (
        f"the parameters lie at other places of the flat tensors of {name}" + _settings_difference(saved, now)
    )


def order_difference(saved: Sequence[str], now: Sequence[str], settings: str = "") -> str | None:
    """The first parameter in which two orders differ, in words; None where they are the same."""
    for position, (before, after) in enumerate(zip(saved, now)):
        if before != after:
            return (
                f"the flat tensors hold the parameters in another order: number {position} was {before} and is now "
                f"{after}"
            )
    if len(saved) != len(now):
        longer = saved if len(saved) > len(now) else now
        return f"the flat tensors hold other parameters: {longer[min(len(saved), len(now))]} is only in one of both"
    return None


def _settings_difference(saved: Layout, now: Layout) -> str:
    changed = [
        f"{key} {saved.settings.get(key, 'unset')} -> {now.settings.get(key, 'unset')}"
        for key in _ORDERING
        if saved.settings.get(key) != now.settings.get(key)
    ]
    return f" (zero_optimization: {', '.join(changed)})" if changed else ""


# ---- DeepSpeed's own records of where a parameter's fp32 values lie


def correct_mappings(wrapper: Any, optimizer: BlockwiseOptimizer) -> None:
    """Puts right what DeepSpeed records of where a parameter's fp32 values lie, in the wrappers that do.

    With ``round_robin_gradients`` it links parameters to their fp32 values (``safe_get_full_fp32_param`` and its like)
    and tells its converter of them as though they lay in the order of definition.
    """
    replaced: dict[str, Any] = {}
    if is_a(wrapper, ZERO12) and wrapper.round_robin_gradients:
        link = wrapper._link_all_hp_params

        def link_true_places() -> None:
            with LINKING_TRUE_PLACES.here(wrapper):
                link()

        replaced["_link_all_hp_params"] = link_true_places
    if is_a(wrapper, ZERO12) or is_a(wrapper, BF16):
        replaced["_param_slice_mappings"] = slice_mappings(contents_of(optimizer))
    if replaced:
        STATE_PLACES.apply(wrapper, **replaced)
    if "_link_all_hp_params" in replaced:
        wrapper._link_all_hp_params()


def contents_of(optimizer: BlockwiseOptimizer) -> list[list[Any]]:
    """As :func:`contents`, with the names that the module has."""
    return _held(optimizer, str)


def slice_mappings(held: list[list[Any]]) -> list[OrderedDict[str, fragment_address]]:
    """DeepSpeed's ``param_slice_mappings`` of flat tensors: where in each lies what is there of a parameter."""
    return [
        OrderedDict((name, fragment_address(numel=numel, start=offset)) for name, _, numel, offset in fragments)
        for _, fragments in held
    ]
