"""The Hugging Face door: factories for the Trainer, and public models of every family.

With DeepSpeed nothing of this is needed: ``TrainingArguments(deepspeed=...)`` and ``import blockwise_lr.deepspeed``.
"""

from .trainer import BlockwiseAdamMiniFactory, BlockwiseAdamWFactory

__all__ = ["BlockwiseAdamMiniFactory", "BlockwiseAdamWFactory"]
