"""What every rank process starts with: imported once, by the server that forks them (see ranks.py)."""

import contextlib
import functools
import gc
import importlib
import importlib.metadata

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
    "megatron_door.checkpoints",
    "megatron_door.inside_deepspeed",
    "hugging_face.runs",
    "accelerate",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
with contextlib.suppress(ImportError):  # Megatron's modules, which are imported where its patch is applied first
    from blockwise_lr.patches.megatron_on_cpu import PATCH

    undo = PATCH.apply()
    try:
        import megatron_door.parts  # noqa: F401

        import blockwise_lr.megatron  # noqa: F401

        with contextlib.suppress(ImportError):  # megatron-core 0.19
            import megatron.training.argument_utils  # noqa: F401
    finally:
        undo()
# the patches ask for versions whenever an engine starts, and each answer parses the metadata of a package
importlib.metadata.version = functools.cache(importlib.metadata.version)
# DeepSpeed collects garbage whenever it logs its memory, up to 30 times an engine: a second each over all that is imported,
# and it would copy the pages that the ranks share
gc.collect()
gc.freeze()
