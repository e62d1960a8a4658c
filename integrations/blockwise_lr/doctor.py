"""What ``blockwise-lr doctor`` reports: versions, patches, kernels, and whose Apex is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from packaging.specifiers import SpecifierSet

from .patches import Patch, all_patches

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


def patch_state(patch: Patch) -> str:
    """One word and a reason: applied, applicable, package absent, or version not supported."""
    version = patch.installed_version()
    if patch.applied:
        return "applied"
    if version is None:
        return f"{patch.package} not installed"
    if version not in SpecifierSet(patch.versions, prereleases=True):
        return f"{patch.package} {version} not supported"
    return "applicable"


def patches() -> list[tuple[Patch, str]]:
    """Every patch and its state, upstream packages not imported."""
    return [(patch, patch_state(patch)) for patch in all_patches()]


def kernels() -> dict[str, str]:
    """Name -> usable, or why not."""
    from .kernels import usable

    return usable()
