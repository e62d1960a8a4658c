"""The DeepSpeed door: importing this package registers our optimizer and scheduler types with DeepSpeed.

After ``import blockwise_lr.deepspeed`` a ds_config may say ``"optimizer": {"type": "BlockwiseAdamW"}`` or
``"BlockwiseAdamMini"``, and ``"scheduler": {"type": "BlockwiseWarmupCosine"}``. Raises
:class:`~blockwise_lr.patches.PatchError` where the installed DeepSpeed is not one this package was written for.
"""

from ..patches import deepspeed_checkpoint, deepspeed_megatron_mpu, deepspeed_ranks, deepspeed_timeouts, deepspeed_types
from .checkpoint import load_newest
from .engine import block_lrs, optimizer_of

__all__ = ["block_lrs", "load_newest", "optimizer_of"]

deepspeed_types.PATCH.apply()
deepspeed_ranks.PATCH.apply()
deepspeed_megatron_mpu.PATCH.apply()
deepspeed_checkpoint.PATCH.apply()
deepspeed_timeouts.PATCH.apply()
