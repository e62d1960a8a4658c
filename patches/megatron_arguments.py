"""megatron.training: our optimizer names and flags in Megatron's own argument parser, and so in its --help.

``--optimizer`` is a closed argparse choice, and ``extra_args_provider`` belongs to the user's script.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_megatron import PACKAGE, VERSIONS


@dataclass(frozen=True)
class Hooks:
    """``add_arguments``: given Megatron's parser, adds ours to it and returns it."""

    add_arguments: Callable[[Any], Any]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.training import arguments

    original = arguments.add_megatron_arguments

    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return hooks.add_arguments(original(parser))

    undo.set(arguments, "add_megatron_arguments", add_megatron_arguments)


PATCH = Patch(
    name="megatron-arguments",
    package=PACKAGE,
    versions=VERSIONS,
    needs="megatron.training",
    symbols=(Symbol("megatron.training.arguments:add_megatron_arguments", ("parser",)),),
    why="--optimizer is a closed choice",
    until="Megatron's optimizer choices come from a registry",
    install=_install,
    hooks=Hooks,
)
