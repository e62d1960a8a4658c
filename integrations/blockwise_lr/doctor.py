"""What ``blockwise-lr doctor`` reports: versions, patches, kernels, and whose Apex is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path

from .patches import Declared, InstancePatch, Patch, all_instance_patches, all_patches, all_upstreams
from .patches.symbols import has_module, is_in

_UNSUPPORTED, _MISSING = "not supported", "missing"
PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "transformers",
    "accelerate",
    "triton",
    "transformer-engine",
    "sentencepiece",
)


def versions() -> dict[str, str]:
    """Python and the packages that matter: version, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def apex() -> str:
    """Which package called apex is installed. NVIDIA's has fused optimizers and no wheel on PyPI, whose apex is a web
    framework add-on."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return "not installed"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "another package of that name (not NVIDIA's)"
    return "NVIDIA Apex"


def patch_state(declared: Declared) -> str:
    """In a few words whether something can be relied on in what is installed, and whether it is in force.

    Imports the upstream package where it is of a supported version, and changes nothing.
    """
    version = declared.installed_version()
    if isinstance(declared, Patch) and declared.applied:
        return "applied"
    if version is None:
        return f"{declared.package} not installed"
    if not is_in(version, declared.versions):
        return f"{declared.package} {version} {_UNSUPPORTED}"
    if declared.needs and not has_module(declared.needs):
        return f"{declared.needs} not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports that are no concern here
        problems = declared.problems()
    if problems:
        return f"{len(problems)} {_MISSING}: " + "; ".join(problems)
    if isinstance(declared, Patch):
        return "applicable"
    if isinstance(declared, InstancePatch):
        return "applicable, per object"
    return f"all {len(declared.symbols_here())} there"


def is_problem(state: str) -> bool:
    """Whether a state tells of something that users must mend."""
    return state.endswith(_UNSUPPORTED) or f" {_MISSING}: " in state


def patches() -> Sequence[tuple[Declared, str]]:
    """Every patch of modules and classes, every patch of single objects, and what is only read, each with its state."""
    return [
        (declared, patch_state(declared)) for declared in (*all_patches(), *all_instance_patches(), *all_upstreams())
    ]


def stale_locks() -> list[Path]:
    """Locks in PyTorch's folder of extensions that a killed build has left: DeepSpeed, and our C++ kernel, wait for them
    without end."""
    from .kernels.cpu import is_stale

    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(folder) if folder else Path.home() / ".cache" / "torch_extensions"
    return sorted(lock for lock in root.glob("**/lock") if is_stale(lock))


def kernels() -> dict[str, str]:
    """Name -> usable, or why not."""
    from .kernels import usable

    return usable()
