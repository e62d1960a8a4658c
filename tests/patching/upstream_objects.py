"""Real engines and optimizers whose attributes are declared in patches/, in the rank processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from blockwise_lr.patches.deepspeed_variants import FLOAT32_ACCUMULATION, WRAPS_OTHERWISE

# by what DeepSpeed wraps the optimizer in
SETTINGS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "ZeRO-2, round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "ZeRO-3": {"stage": 3},
    "BF16_Optimizer": {
        "stage": 1,
        "dtype": "bf16",
        "bf16": {"immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "unfused": {"stage": 0, "dtype": "fp16"},
}
if FLOAT32_ACCUMULATION.here == WRAPS_OTHERWISE:  # and so refused
    del SETTINGS["BF16_Optimizer"]


def engine_of(kind: str, optimizer: str = "BlockwiseAdamMini") -> Any:
    """A DeepSpeed engine around the small Llama."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed_door.engines import config, start
    from twins import make

    get_accelerator().is_fp16_supported = lambda: True  # torch computes in half on any CPU; DeepSpeed wants it native
    settings = dict(SETTINGS[kind])
    # what old versions lose of more micro batches is refused
    return start(make("llama"), config(optimizer, settings.pop("stage"), gradient_accumulation_steps=1, **settings))


def objects_of(engine: Any) -> dict[str, Any]:
    """The objects of an engine that something is declared of, by a name."""
    config = engine._config
    return {
        "engine": engine,
        "wrapper": engine.optimizer,
        "monitor": engine.monitor,
        "checkpoint engine": engine.checkpoint_engine,
        "parameter": next(engine.module.parameters()),
        "config": config,
        "zero": config.zero_config,
        "offload": config.zero_config.offload_optimizer,
        "fp16": getattr(config, "float16_config", None),  # DeepSpeed 0.17 and later
        "bf16": getattr(config, "bfloat16_config", None),
        "tensor parallel": config.tensor_parallel_config,
    }


@contextlib.contextmanager
def megatron_wrapper(kind: str) -> Iterator[Any]:
    """Megatron's optimizer around ours: distributed, bf16 or plain."""
    from megatron_door.layouts import Layout, build_chunks, megatron
    from megatron_door.training import make_optimizer, wrap

    import blockwise_lr.megatron

    layout = Layout(distributed=kind.startswith("distributed"), bf16=kind.endswith("bf16"))
    with megatron(layout):
        undo = blockwise_lr.megatron.register()
        try:
            wrapped = wrap(build_chunks("llama", layout), layout)
            yield make_optimizer(wrapped, "blockwise_adam_mini", layout).chained_optimizers[0]
        finally:
            undo()


@contextlib.contextmanager
def without(instance: Any, name: str) -> Iterator[None]:
    """Meanwhile an object lacks an attribute, as if upstream had renamed it."""
    held = vars(instance)
    places = [place for place in (held, held.get("_modules", {})) if name in place]
    values = [place.pop(name) for place in places]
    if places:
        try:
            yield
        finally:
            for place, value in zip(places, values):
                place[name] = value
        return
    with without_symbol(type(instance), name):
        yield


@contextlib.contextmanager
def without_symbol(owner: Any, name: str) -> Iterator[None]:
    """Meanwhile a module lacks an attribute, or a class and all that it inherits from do."""
    holders = [kind for kind in getattr(owner, "__mro__", (owner,)) if name in vars(kind) and kind is not object]
    assert holders, f"{owner} has no {name}"
    values = [(holder, vars(holder)[name]) for holder in holders]
    for holder, _ in values:
        delattr(holder, name)
    try:
        yield
    finally:
        for holder, value in values:
            setattr(holder, name, value)
