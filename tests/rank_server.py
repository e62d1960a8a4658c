"""What every rank process starts with: imported once, by the server that forks them (see ranks.py)."""

import contextlib
import importlib

# slow imports of the tests' cases; a lane may lack some of them
for name in (
    "torch",
    "numpy",
    "transformers",
    "deepspeed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "blockwise_lr.deepspeed",
    "twins",
    "deepspeed_door.crash_worker",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
