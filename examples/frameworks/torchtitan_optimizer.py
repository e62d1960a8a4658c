"""torchtitan: an optimizers container that builds ours, for the ``optimizer`` of a ``Trainer.Config``.

torchtitan's own container knows Adam, AdamW and DistMuon by name and has no other way in, but it may be inherited from. In
a config_registry.py:

    from examples.frameworks.torchtitan_optimizer import BlockwiseOptimizers

    def llama3_8b_blockwise() -> Trainer.Config:
        config = llama3_8b()
        config.optimizer = BlockwiseOptimizers.Config(options={"lr": 3e-4, "weight_decay": 0.1})
        return config

It is built after torchtitan has parallelized the model: FSDP2 and HSDP, and pipelines of them. Its schedules scale ``lr``
and so keep the ratios. Tensor parallelism (``fully_shard`` on DTensors) is refused when the optimizer is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer

import blockwise_lr


def fused_qkv_rules(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Where q, k and v lie in each FusedQKVLinear: for each query group its q heads, then k, then v."""
    rules = []
    for name, module in model.named_modules():
        if hasattr(module, "wqkv") and hasattr(module, "heads_per_kv"):
            groups = module.wqkv.weight.shape[0] // ((module.heads_per_kv + 2) * module.head_dim)
            heads = {"q_heads": groups * module.heads_per_kv, "kv_heads": groups}
            match = f"{canonical_fqn(name)}.wqkv.*"
            rules.append({"match": match, "split": ["q", "k", "v"], "interleave": "group", **heads})
    return rules


class BlockwiseOptimizers(OptimizersContainer):
    """One blockwise optimizer for each part of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        kind: str = "BlockwiseAdamW"
        """Which of blockwise_lr's optimizers."""

        options: dict[str, Any] = field(default_factory=dict)
        """Its options, ``lr`` and ``block_lr_ratios`` among them; ``block_rules`` go to ``map_blocks``."""

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        options = dict(config.options)
        rules = options.pop("block_rules", ())
        self.model_parts, self.optimizers = model_parts, []
        for part in model_parts:
            named = [(canonical_fqn(name), p) for name, p in part.named_parameters() if p.requires_grad]
            block_map = blockwise_lr.map_blocks(part, rules=[*rules, *fused_qkv_rules(part)])
            self.optimizers.append(getattr(blockwise_lr, config.kind)(named, block_map=block_map, **options))
        self._post_init([p for part in model_parts for p in part.parameters() if p.requires_grad])
