"""Everything this package knows of the inside of DeepSpeed and Megatron: what it replaces there, and what it reads.

Installed as ``blockwise_lr.patches``; imports nothing of blockwise_lr, and DeepSpeed and Megatron only when something is
checked or applied. A module defines a :class:`Patch` called ``PATCH`` (a change for the whole process, whose caller hands
in what it puts in place), ``INSTANCE_PATCHES`` (changes to single objects) or an :class:`Upstream` (what is only read).
``blockwise-lr doctor`` lists them all.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from .base import Patch
from .instances import InstancePatch, undo_instance
from .symbols import Declared, PatchError
from .upstream import Upstream

__all__ = [
    "Declared",
    "InstancePatch",
    "Patch",
    "PatchError",
    "Upstream",
    "all_instance_patches",
    "all_patches",
    "all_upstreams",
    "undo_instance",
]


def all_patches() -> list[Patch[Any]]:
    """Every patch of this package, sorted by name. Imports no upstream framework."""
    return sorted((found for found in _declared() if isinstance(found, Patch)), key=lambda found: found.name)


def all_instance_patches() -> list[InstancePatch]:
    """The same of what is changed on single objects."""
    return sorted((found for found in _declared() if isinstance(found, InstancePatch)), key=lambda found: found.name)


def all_upstreams() -> list[Upstream]:
    """The same of what is only read."""
    return sorted((found for found in _declared() if isinstance(found, Upstream)), key=lambda found: found.name)


def _declared() -> Iterator[Declared]:
    """What the modules define, once each."""
    found: dict[str, Declared] = {}
    for info in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{info.name}")).values():
            if isinstance(value, Declared):
                found[value.name] = value
    yield from found.values()
