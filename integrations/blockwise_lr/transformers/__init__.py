"""Hugging Face integration: optimizer factories for the Trainer, and public models of every family.

Not needed with DeepSpeed: use ``TrainingArguments(deepspeed=...)`` and ``import blockwise_lr.deepspeed``.
"""

from .trainer import BlockwiseAdamMiniFactory, BlockwiseAdamWFactory

__all__ = ["BlockwiseAdamMiniFactory", "BlockwiseAdamWFactory"]
