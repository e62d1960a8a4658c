"""Runtime patches to DeepSpeed and Megatron, one module per upstream concern.

Installed as ``blockwise_lr.patches``. A module defines one :class:`~blockwise_lr.patches.base.Patch` called ``PATCH``;
``all_patches`` finds them, and ``blockwise-lr doctor`` prints them.
"""

import importlib
import pkgutil

from .base import Patch, PatchError

__all__ = ["Patch", "PatchError", "all_patches"]


def all_patches() -> list[Patch]:
    """Every patch of this package, sorted by name. Imports no upstream framework."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return sorted((m.PATCH for m in modules if hasattr(m, "PATCH")), key=lambda patch: patch.name)
