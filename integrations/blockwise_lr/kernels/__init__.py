"""Kernels: one optimizer step over one flat tensor. All implement :class:`~blockwise_lr.kernels.interface.Kernel`."""
from __future__ import annotations

import functools

import torch

from . import cpu
from . import triton as triton_kernel
from .interface import Kernel, StepValues
from .reference import ReferenceKernel

__all__ = ["KERNELS", "Kernel", "ReferenceKernel", "StepValues", "kernel_for", "usable"]

KERNELS = ("auto", "reference", "cpp", "triton")
_REFERENCE = ReferenceKernel()
_TRITON = triton_kernel.TritonKernel()


@functools.cache
def _cpp() -> cpu.CppKernel | None:
    built = cpu.library()
    return None if built is None else cpu.CppKernel(built)


def kernel_for(device: torch.device, name: str = "auto") -> Kernel:
    """The kernel for tensors on a device.

    Args:
        device: where the optimizer's tensors are.
        name: one of KERNELS; "auto" takes the fastest that is usable there.

    Raises:
        ValueError: an unknown name, or a kernel that is asked for by name and cannot be had.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; use one of {', '.join(KERNELS)}")
    if name == "cpp" and (device.type != "cpu" or _cpp() is None):
        raise ValueError(f"the kernel 'cpp' is not usable on {device.type} here; use kernel=\"auto\" "
                         f"(`blockwise-lr doctor` says what is missing)")
    if name == "triton" and triton_kernel.missing():
        raise ValueError(f"the kernel 'triton' is not usable here: {triton_kernel.missing()}; use kernel=\"auto\"")
    if name == "triton" or (name == "auto" and device.type == "cuda" and not triton_kernel.missing()):
        return _TRITON
    if name != "reference" and device.type == "cpu":
        return _cpp() or _REFERENCE
    return _REFERENCE


def usable() -> dict[str, str]:
    """Kernel name -> where it is usable, or why it is not. Builds what can be built."""
    return {"reference": "yes, on every device",
            "triton": f"no: {triton_kernel.missing()}" if triton_kernel.missing() else "yes, on the GPU",
            "cpp": "yes, on the CPU" if _cpp() is not None else "no: it could not be built (g++ and ninja are needed)"}
