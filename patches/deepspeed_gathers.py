"""DeepSpeed before 0.19.8, ZeRO-3 on the CPU: parameters are read before all of them have been gathered.

Where several are gathered in one call, DeepSpeed waits for the last gather only. On a GPU the earlier ones are done then, for
they are on one stream; gloo's run side by side, and on a busy machine the weights of a step are what was in memory before, NaN
among it. 0.19.8 waits for each. Here each parameter is gathered by a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Patch, Undo
from .deepspeed_variants import WAITS_FOR_EACH_GATHER
from .symbols import Symbol
from .upstream_deepspeed import PACKAGE, VERSIONS

_INIT = "deepspeed.runtime.zero.partition_parameters:Init"


def _install(undo: Undo, _: None) -> None:
    if WAITS_FOR_EACH_GATHER.here:
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    original = Init._allgather_params_coalesced

    def gather(self: Any, param_list: Sequence[Any], hierarchy: int = 0, quantize: bool = False) -> None:
        apart = get_accelerator().device_name() == "cpu"
        for params in [[param] for param in param_list] if apart else [param_list]:
            original(self, params, hierarchy, quantize)

    undo.set(Init, "_allgather_params_coalesced", gather)


PATCH = Patch(
    name="deepspeed-gathers",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_INIT + "._allgather_params_coalesced", ("self", "param_list", "hierarchy", "quantize"), "<0.19.8"),
    ),
    why="it waits for the last of several gathers, and gloo's do not end in their order",
    until="0.19.8 is the oldest DeepSpeed that this takes",
    install=_install,
)
