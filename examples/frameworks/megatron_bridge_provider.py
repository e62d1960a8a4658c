"""Megatron-Bridge: its hook for an optimizer's param groups is called right before the optimizer is built.

    config = llama3_8b_pretrain_config()  # or any recipe
    config.optimizer.optimizer = "blockwise_adamw"
    config.optimizer_config_override_provider = BlockwiseOverrides({"embedding": 10, "qk": 8, "ffn": 6, "vo": 4, "norm": 1})
    pretrain(config, forward_step)

Overrides alone would give whole parameters a rate; q, k and v of Megatron's one linear_qkv share a parameter. So this one
leaves the overrides as they are and has megatron-core build our optimizer, which splits the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.training.config import OptimizerConfigOverrideProvider, OptimizerConfigOverrideProviderContext

from blockwise_lr.megatron import register


@dataclass
class BlockwiseOverrides(OptimizerConfigOverrideProvider):
    """Registers our optimizers with these settings (those of :func:`blockwise_lr.megatron.register`)."""

    block_lr_ratios: str | Mapping[str, float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build_config_overrides(self, context: OptimizerConfigOverrideProviderContext) -> Any:
        register(block_lr_ratios=self.block_lr_ratios, **self.settings)
        return super().build_config_overrides(context)
