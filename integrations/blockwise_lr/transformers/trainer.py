"""Hugging Face Trainer without DeepSpeed: ``optimizer_cls_and_kwargs=(BlockwiseAdamWFactory, {"lr": 6e-4})``.

The Trainer calls a factory with the final model: wrapped, sharded and with adapters (transformers.trainer_optimizer,
``is_optimizer_factory``). Its learning-rate schedulers scale ``lr`` and so keep the ratios.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..blocks import BlockError, map_blocks
from ..blocks.presets import ANY_SIZE
from ..optim import CLASSES
from ..optim.base import BlockwiseOptimizer


class OptimizerFactory:
    """Base of the factories, ``Blockwise<title>Factory`` for every rule: make its optimizer for the Trainer's model."""

    optimizer: ClassVar[type[BlockwiseOptimizer]]

    def __call__(self, model: torch.nn.Module, **settings: Any) -> BlockwiseOptimizer:
        """Builds the optimizer of a model.

        Args:
            model: the Trainer's model.
            settings: arguments of the optimizer's class; ``block_rules`` and ``block_strict`` are passed to
                :func:`~blockwise_lr.map_blocks`.

        Raises:
            BlockError: as for :func:`~blockwise_lr.map_blocks` and the optimizer's class; or no learning rate is given.
        """
        if not settings.keys() & {"lr", "adamw_lr"}:  # a factory is called without the Trainer's arguments
            raise BlockError(
                f"{type(self).__name__} needs its own learning rate, for the Trainer does not tell it the learning_rate of "
                f'TrainingArguments: give {{"lr": ...}} beside it'
                + (', or {"adamw_lr": ...}, the rate of an AdamW run' if self.optimizer.Options.FOLLOWS_ADAMW else "")
            )
        options = self.optimizer.Options.checked(settings, f"{self.optimizer.__name__}: ", config=ANY_SIZE)
        settings = {key: value for key, value in settings.items() if key not in ("block_rules", "block_strict")}
        block_map = map_blocks(model, rules=options.block_rules, strict=options.block_strict)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return self.optimizer(trained, block_map=block_map, **settings)


def _factory(kind: type[BlockwiseOptimizer]) -> type[OptimizerFactory]:
    documentation = f"Makes a :class:`~blockwise_lr.{kind.__name__}` for the Trainer's model."
    made = {"optimizer": kind, "__doc__": documentation, "__module__": __package__}
    return type(f"{kind.__name__}Factory", (OptimizerFactory,), made)


FACTORIES: dict[str, type[OptimizerFactory]] = {f"{name}Factory": _factory(kind) for name, kind in CLASSES.items()}
