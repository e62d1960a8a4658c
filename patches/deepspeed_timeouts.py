"""DeepSpeed: the timeout given to ``init_distributed`` holds for every process group, and not for the first one alone.

DeepSpeed makes its other groups with PyTorch's default, 30 minutes on gloo and 10 on NCCL: so long ranks wait for one
that died before the first step, whatever the user asked for. Runs that give no timeout wait as before.
"""

from __future__ import annotations

from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_deepspeed import PACKAGE, VERSIONS

_BACKEND = "deepspeed.comm.torch:TorchBackend."


def _install(undo: Undo, _: None) -> None:
    import torch
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.constants import default_pg_timeout

    init = TorchBackend.init_process_group

    def init_process_group(self: Any, backend: Any, timeout: Any, init_method: Any, rank: int, world_size: int) -> None:
        self.blockwise_timeout = None if timeout == default_pg_timeout else timeout
        init(self, backend, timeout, init_method, rank, world_size)

    def new_group(self: Any, ranks: Any) -> Any:
        return torch.distributed.new_group(ranks, timeout=getattr(self, "blockwise_timeout", None))

    undo.set(TorchBackend, "init_process_group", init_process_group)
    undo.set(TorchBackend, "new_group", new_group)


PATCH = Patch(
    name="deepspeed-timeouts",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_BACKEND + "init_process_group", ("self", "backend", "timeout", "init_method", "rank", "world_size")),
        Symbol(_BACKEND + "new_group", ("self", "ranks")),
    ),
    reads=(Symbol("deepspeed.constants:default_pg_timeout"),),
    why="new_group passes no timeout on",
    until="DeepSpeed passes its timeout to torch.distributed.new_group",
    install=_install,
)
