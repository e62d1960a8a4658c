"""What a kernel is: one optimizer step over one flat tensor, following its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..plan.step_plan import Rectangles, StepPlan
from ..rules.base import UpdateRule

# as compiled kernels number them
GRADIENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepValues:
    """The numbers of one step.

    Attributes:
        lrs: learning rate per class of the plan.
        decays: weight decay per class (decoupled: parameters shrink by 1 - lr * decay).
        scalars: the rule's own, equal for all elements; see :meth:`~blockwise_lr.rules.UpdateRule.scalars`.
    """

    lrs: tuple[float, ...]
    decays: tuple[float, ...]
    scalars: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """One tensor's step. All tensors but ``moments`` are flat (numel,) and contiguous.

    Attributes:
        param: what is stepped, in place.
        grad: float32, bfloat16 or float16.
        states: the rule's element states in its order, stepped in place.
        plan, values: what lies in the tensor, and the numbers of this step.
        out: bfloat16, takes the updated parameters rounded to nearest.
        moments: (slots,), the segment state of rules that have one, stepped in place.
    """

    param: torch.Tensor
    grad: torch.Tensor
    states: Sequence[torch.Tensor]
    plan: StepPlan
    values: StepValues
    out: torch.Tensor | None = None
    moments: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """In the order of :func:`fits`."""
        return [self.param, self.grad, *self.states, *(() if self.moments is None else (self.moments,))]

    def rectangles(self, presummed: bool) -> Rectangles:
        """What is stepped."""
        return self.plan.shared if presummed else self.plan.local


class Kernel(Protocol):
    """One implementation; all give the same numbers (the reference's to the bit, others within 1e-6 relative)."""

    name: str

    def step(self, rule: UpdateRule, works: Sequence[Work], *, presummed: bool = False) -> None:
        """One step of several tensors, in one launch where the kernel can; elements outside of the plans' rectangles stay
        as they are.

        Args:
            presummed: of rules with segments, over ``plan.shared``, whose moments of this step the caller has already set,
                in place of ``plan.local``, whose squared gradients are summed here.
        """

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        """Adds each segment's sum of squared gradients to its slot of ``sums`` (slots,), float32."""


def fits(devices: Sequence[str], *tensors: torch.Tensor) -> bool:
    """Whether compiled code takes the tensors: float32, all on these types of device; the second, the gradient, in any of
    GRADIENT_TYPES."""
    return all(
        t.device.type in devices and (t.dtype in GRADIENT_TYPES if number == 1 else t.dtype == torch.float32)
        for number, t in enumerate(tensors)
    )


def refuse_other_sizes(rectangles: Rectangles, *rows: torch.Tensor | None, slots: torch.Tensor | None = None) -> None:
    """Compiled kernels write where the plan tells them to, so memory that does not reach so far stops here.

    Args:
        rectangles: what will be stepped.
        rows: tensors with a value per element; None for those that are not given.
        slots: the one with a value per segment.

    Raises:
        ValueError: a tensor is not contiguous, too small, or of another size than the first.
    """
    elements, segments = rectangles.extent
    given = [tensor for tensor in rows if tensor is not None]
    for tensor in given:
        if not tensor.is_contiguous() or tensor.numel() < elements or tensor.numel() != given[0].numel():
            raise ValueError(
                f"a kernel was given a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} where "
                f"{given[0].numel()} elements in a row are needed, and its plan reaches to {elements}"
            )
    if slots is not None and (not slots.is_contiguous() or slots.numel() < segments):
        raise ValueError(f"a kernel was given {slots.numel()} second moments where its plan has {segments} segments")
