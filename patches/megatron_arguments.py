"""megatron.training: our optimizer names and flags in Megatron's own argument parser, and so in its --help.

``--optimizer`` is a closed argparse choice, and ``extra_args_provider`` belongs to the user's script.
"""

from __future__ import annotations

import functools
from typing import Any

from .base import Patch, Symbol, Undo


def _install(undo: Undo) -> None:
    from megatron.training import arguments

    from blockwise_lr.megatron.settings import add_arguments

    original = arguments.add_megatron_arguments

    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return add_arguments(original(parser))

    undo.set(arguments, "add_megatron_arguments", add_megatron_arguments)


PATCH = Patch(
    name="megatron-arguments",
    package="megatron-core",
    versions=">=0.16,<0.20",
    symbols=(
        Symbol("megatron.training.arguments:add_megatron_arguments", ("parser",)),
        Symbol("megatron.training.global_vars:_GLOBAL_ARGS"),  # where settings_of finds what was parsed
    ),
    why="--optimizer is a closed choice",
    until="Megatron's optimizer choices come from a registry",
    install=_install,
)
