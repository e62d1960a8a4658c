"""The DeepSpeed door: importing this package registers our optimizer and scheduler types with DeepSpeed.

After ``import blockwise_lr.deepspeed`` a ds_config may say ``"optimizer": {"type": "BlockwiseAdamW"}`` or
``"BlockwiseAdamMini"``, and ``"scheduler": {"type": "BlockwiseWarmupCosine"}``. Raises
:class:`~blockwise_lr.patches.PatchError` where the installed DeepSpeed is not one this package was written for.
"""

from ..patches import upstream_deepspeed

upstream_deepspeed.UPSTREAM.check()  # before the imports below, which would fail on another DeepSpeed with less to say

from .checkpoint import load_newest  # noqa: E402
from .door import apply_patches  # noqa: E402
from .engine import block_lrs, detach, optimizer_of  # noqa: E402
from .guard import guard  # noqa: E402
from .preemption import preemption  # noqa: E402

__all__ = ["block_lrs", "detach", "guard", "load_newest", "optimizer_of", "preemption"]

apply_patches()
