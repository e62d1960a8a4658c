"""DeepSpeed: optimizer and scheduler types of ours in a ds_config.

DeepSpeed knows a closed list of optimizer names and otherwise looks into torch.optim, and it builds optimizers from
tensors without names. So this adds our names to its lookup, hands our builder the engine's module, and once DeepSpeed has
wrapped the optimizer tells it what the flat tensors hold. Engines with other optimizers go DeepSpeed's own way unchanged.
"""

from __future__ import annotations

from typing import Any

from .base import Patch, Symbol, Undo

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine."
_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"


def _install(undo: Undo) -> None:
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import utils

    from blockwise_lr.collective.errors import run_on_all_ranks
    from blockwise_lr.deepspeed.agreement import compare_made, is_callable
    from blockwise_lr.deepspeed.build import OPTIMIZER_TYPES, build_optimizer
    from blockwise_lr.deepspeed.engine import attach
    from blockwise_lr.optim.base import BlockwiseOptimizer
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    is_supported = DeepSpeedEngine._is_supported_optimizer
    build = DeepSpeedEngine._configure_basic_optimizer
    configure = DeepSpeedEngine._configure_optimizer

    def _is_supported_optimizer(self: Any, optimizer_name: str) -> bool:
        return optimizer_name in OPTIMIZER_TYPES or is_supported(self, optimizer_name)

    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        if self.optimizer_name() not in OPTIMIZER_TYPES:
            return build(self, model_parameters)
        made = build_optimizer(self.optimizer_name(), self.module, model_parameters, self.optimizer_params() or {})
        compare_made(made, self.module, self.mpu)
        return made

    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if is_callable(client_optimizer):  # made here, so that all ranks hear of an error, or of another class
            make = client_optimizer
            client_optimizer = run_on_all_ranks(lambda: make(model_parameters), "building the optimizer")
            compare_made(client_optimizer, self.module, self.mpu)
        with BlockwiseOptimizer.holding_steps():  # the fp16 wrapper takes a step on zero gradients while it is built
            configure(self, client_optimizer, model_parameters)
        attach(self)

    undo.set(DeepSpeedEngine, "_is_supported_optimizer", _is_supported_optimizer)
    undo.set(DeepSpeedEngine, "_configure_basic_optimizer", _configure_basic_optimizer)
    undo.set(DeepSpeedEngine, "_configure_optimizer", _configure_optimizer)
    undo.set(lr_schedules, "BlockwiseWarmupCosine", BlockwiseWarmupCosine)
    for kind in OPTIMIZER_TYPES.values():
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)
        undo.call(lambda kind=kind: utils.ZERO_SUPPORTED_OPTIMIZERS.remove(kind))


PATCH = Patch(
    name="deepspeed-types",
    package="deepspeed",
    versions=">=0.19.8,<0.20",
    symbols=(
        Symbol(_ENGINE + "_is_supported_optimizer", ("self", "optimizer_name")),
        Symbol(_ENGINE + "_configure_basic_optimizer", ("self", "model_parameters")),
        Symbol(_ENGINE + "_configure_optimizer", ("self", "client_optimizer", "model_parameters")),
        Symbol("deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS"),
        Symbol("deepspeed.runtime.lr_schedules:WarmupLR"),
        # wrapped on the instances, by blockwise_lr.deepspeed.state_access
        *(Symbol(f"{path}._link_all_hp_params", ("self",)) for path in (_ZERO12, _BF16)),
        Symbol("deepspeed.utils:get_full_hp_param", ("self", "optim_state_key")),
        Symbol("deepspeed.utils:set_full_hp_param", ("self", "value", "optim_state_key")),
        Symbol(_ZERO3 + ".get_full_hp_param", ("self", "param", "optim_state_key")),
        Symbol(_ZERO3 + ".set_full_hp_param", ("self", "value", "param", "optim_state_key")),
        Symbol(_ZERO3 + ".get_local_fp32_param", ("self", "param", "optim_state_key")),
        Symbol(_ZERO3 + ".set_local_hp_param", ("self", "value", "param", "optim_state_key")),
    ),
    why="DeepSpeed's list of optimizer types is closed, and it builds optimizers from tensors without names",
    until="DeepSpeed offers a registry of optimizer types that are given the module",
    install=_install,
)
