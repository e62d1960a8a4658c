"""Kernels: one optimizer step over one flat tensor. All implement :class:`~blockwise_lr.kernels.interface.Kernel`."""
from __future__ import annotations

import torch

from .interface import Kernel, StepValues
from .reference import ReferenceKernel

__all__ = ["KERNELS", "Kernel", "ReferenceKernel", "StepValues", "kernel_for"]

KERNELS = ("auto", "reference")
_REFERENCE = ReferenceKernel()


def kernel_for(device: torch.device, name: str = "auto") -> Kernel:
    """The kernel for tensors on a device.

    Args:
        device: where the optimizer's tensors are.
        name: one of KERNELS; "auto" takes the fastest that is usable there.

    Raises:
        ValueError: an unknown name, or a kernel that cannot run on that device.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; use one of {', '.join(KERNELS)}")
    return _REFERENCE


def usable() -> dict[str, str]:
    """Kernel name -> where it is usable, or why it is not."""
    return {"reference": "yes, on every device"}
