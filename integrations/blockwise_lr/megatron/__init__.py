"""The Megatron door: blockwise optimizers for megatron-core 0.16 to 0.19 under any of its parallelisms.

``python -m blockwise_lr.megatron SCRIPT ARGS…`` runs an unmodified pretrain script with our flags. Library users call
:func:`register` once and go on using ``get_megatron_optimizer``, with ``OptimizerConfig(optimizer="blockwise_adamw")``.
"""

from ..patches import upstream_megatron

upstream_megatron.UPSTREAM.check()  # before the imports below, which would fail on another Megatron with less to say

from .build import optimizers_of  # noqa: E402
from .door import Registration, register  # noqa: E402
from .sequence_length import cut_batches, length_schedule  # noqa: E402
from .settings import KINDS, BlockSettings  # noqa: E402
from .sharpness import measure_sharpness  # noqa: E402

__all__ = [
    "KINDS",
    "BlockSettings",
    "Registration",
    "cut_batches",
    "length_schedule",
    "measure_sharpness",
    "optimizers_of",
    "register",
]
