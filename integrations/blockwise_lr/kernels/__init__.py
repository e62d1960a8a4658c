"""Kernels: one optimizer step over one flat tensor. All implement :class:`~blockwise_lr.kernels.interface.Kernel`."""

from __future__ import annotations

import functools
import os

import torch

from ..rules.options import KERNELS
from . import cpu
from .interface import Kernel, StepValues, Work
from .reference import ReferenceKernel

__all__ = ["KERNELS", "Kernel", "ReferenceKernel", "StepValues", "Work", "kernel_for", "usable"]

_REFERENCE = ReferenceKernel()


@functools.cache
def _cpp() -> Kernel | None:
    built = cpu.library()
    return None if built is None else cpu.CppKernel(built)


@functools.cache
def _triton() -> Kernel | None:
    try:
        from . import triton
    except ImportError:  # PyTorch's CUDA builds bring it, its CPU builds do not
        return None
    return triton.TritonKernel()


def _missing(name: str, device_type: str) -> str | None:
    """Why a kernel cannot step tensors on a type of device, or None. Builds what can be built."""
    if name == "cpp":
        if device_type != "cpu":
            return "it is for the CPU"
        return None if _cpp() else "it could not be built (g++ and ninja are needed)"
    if name == "triton":
        if device_type != "cuda" and (device_type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
            return "it needs a CUDA device"
        return None if _triton() else "triton is not installed (PyTorch's CUDA builds bring it)"
    return None


def kernel_for(device: torch.device, name: str = "auto") -> Kernel:
    """The kernel for tensors on a device.

    Args:
        device: where the optimizer's tensors are.
        name: one of KERNELS; "auto" takes the C++ kernel on the CPU, Triton on CUDA devices, and the reference where
            these are not usable and everywhere else.

    Raises:
        ValueError: an unknown name, or a kernel that is asked for by name and cannot be had.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; use one of {', '.join(KERNELS)}")
    reason = None if name == "auto" else _missing(name, device.type)
    if reason:
        raise ValueError(f'the kernel {name!r} is not usable on {device.type} here: {reason}; use kernel="auto"')
    if name == "auto":
        name = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    return {"cpp": _cpp, "triton": _triton}.get(name, lambda: None)() or _REFERENCE


def usable() -> dict[str, str]:
    """Kernel name -> where it is usable, or why it is not. Builds what can be built."""
    cpp = _missing("cpp", "cpu")
    triton = _missing("triton", "cuda") or (None if torch.cuda.is_available() else "there is no CUDA device")
    return {
        "reference": "yes, on every device",
        "cpp": f"no: {cpp}" if cpp else "yes, on the CPU",
        "triton": f"no: {triton}" if triton else "yes, on CUDA devices",
    }
