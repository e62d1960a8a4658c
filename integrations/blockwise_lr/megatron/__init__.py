"""The Megatron door: blockwise optimizers for megatron-core 0.16 to 0.19 under any of its parallelisms.

``python -m blockwise_lr.megatron SCRIPT ARGS…`` runs an unmodified pretrain script with our flags. Library users call
:func:`register` once and go on using ``get_megatron_optimizer``, with ``OptimizerConfig(optimizer="blockwise_adamw")``.
"""

from .door import register
from .settings import KINDS, BlockSettings

__all__ = ["KINDS", "BlockSettings", "register"]
