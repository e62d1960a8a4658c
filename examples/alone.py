"""DeepSpeed in a process that no launcher has started."""

from __future__ import annotations

import logging
import os

import deepspeed
import torch.distributed as dist


def start() -> None:
    """A process group of this process alone, where torchrun has said nothing of others (it needs no port), and a quiet log."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
