"""What an update rule is: everything that makes an optimizer this one and no other, in one file of this package.

From a rule follow the optimizer's class (``Blockwise<title>``), its DeepSpeed type, its name in Megatron and its factory for
Hugging Face's Trainer, what its checkpoints hold, and the reference kernel. Bodies for the compiled kernels are optional:
a rule without one is stepped by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..blocks.layout import ParamLayout
from .options import OptimizerOptions

try:
    import triton.language as tl
except ImportError:  # PyTorch's CUDA builds bring it, its CPU builds do not
    tl = None

__all__ = ["RULES", "CppBody", "State", "UpdateRule", "tl"]


@dataclass(frozen=True)
class State:
    """A tensor that a rule keeps for every parameter.

    Attributes:
        name: its key in the optimizer's state and in checkpoints.
        per: "element": of the parameter's shape; "segment": one value per segment, see :meth:`UpdateRule.segments`.
    """

    name: str
    per: Literal["element", "segment"] = "element"


@dataclass(frozen=True)
class CppBody:
    """A rule's bodies for the C++ kernel; its loops are in kernels/loops.h.

    Attributes:
        update: statements that update ``n`` consecutive elements of one class, at ``p`` (float *, parameters), ``g``
            (const G *, gradients of type G, to be cast to float), ``first`` and ``second`` (float *, element states in the
            rule's order), with ``lr``, ``keep`` (1 - lr * weight decay), ``s`` (the rule's scalars, ``s[0]``…) and, for a rule
            with segments, ``of_segment`` (see below). ``n`` is at most ``burst``; elements are numbered by ``i``.
        moment: an expression for a segment's next state, of ``moment``, ``mean`` (of its squared gradients) and ``s``.
        of_segment: an expression for what the update needs of a segment, of ``moment`` (its state), ``lr`` and ``s``.
    """

    update: str
    moment: str | None = None
    of_segment: str | None = None


RULES: dict[str, UpdateRule] = {}


class UpdateRule:
    """Base of the rules. A subclass with a ``name`` is a rule of its own and known from then on.

    Attributes:
        name: short, as in Megatron's ``--optimizer blockwise_<name>``; also the kernels' key.
        title: as in the class's name, ``Blockwise<title>``.
        Options: the optimizer's options, typed, with their checks and descriptions.
        positional: options that Python callers may give by position, as in torch.optim.
        states: element states first, then at most one per segment.
        highest_usual_lr: above what a single learning rate of this rule is usually set to, whatever the model.
        complex_as_pairs: complex parameters are stepped as pairs of real numbers; refused otherwise.
        whole_matrices: hidden matrices are stepped as wholes (optim/matrixwise.py), only the rest by the bodies.
        cpp: for the C++ kernel: at most two element states, or one and a segment state.
        triton, triton_moment: for the Triton kernel, plain functions that it compiles: ``triton(param, grad, first, second,
            lr, keep, s)`` returns the three updated tensors (``second`` is the segment state, broadcast, where there is
            one, and an unused tensor where the rule has one state), ``triton_moment(moment, mean, s)`` the next segment
            state; ``s`` points to the scalars.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Options: ClassVar[type[OptimizerOptions]]
    positional: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[State, ...]]
    highest_usual_lr: ClassVar[float] = 1e-2
    complex_as_pairs: ClassVar[bool] = False
    whole_matrices: ClassVar[bool] = False
    cpp: ClassVar[CppBody | None] = None
    triton: ClassVar[Callable[..., Any] | None] = None
    triton_moment: ClassVar[Callable[..., Any] | None] = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" not in vars(cls):
            return
        known = RULES.get(cls.name)
        if known is not None and (type(known).__module__, type(known).__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"the update rule {cls.__qualname__} is named {cls.name!r}, as {type(known).__qualname__} is; rename it"
            )
        RULES[cls.name] = cls()

    @property
    def class_name(self) -> str:
        """That of the optimizer's class: its type in a ds_config and in checkpoints."""
        return f"Blockwise{self.title}"

    @property
    def element_states(self) -> tuple[State, ...]:
        """The states of the parameter's shape."""
        return tuple(state for state in self.states if state.per == "element")

    @property
    def segment_state(self) -> State | None:
        """The state that has one value per segment, if the rule keeps one."""
        return next((state for state in self.states if state.per == "segment"), None)

    def segments(self, layout: ParamLayout, bias_segments: str | None) -> ParamLayout:
        """The layout whose units are this rule's segments.

        Args:
            layout: of a parameter, as the block map has it.
            bias_segments: the option of that name, where the rule has it.
        """
        return layout

    def scalars(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """The numbers of one step that are equal for all elements, as the bodies take them.

        Args:
            group: a param group, with the rule's options.
            step: number of the step, from 1.
        """
        raise NotImplementedError

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        lr: float,
        decay: float,
        scalars: Sequence[float],
    ) -> None:
        """One step of elements of one class, in place.

        Args:
            param, grad: of equal shape and dtype.
            states: in the rule's order; a segment state is that of this step already, and broadcasts to the shape.
            lr, decay: learning rate and weight decay of the class.
            scalars: from :meth:`scalars`.
        """
        raise NotImplementedError

    def next_moment(self, moment: torch.Tensor, mean_square: torch.Tensor, scalars: Sequence[float]) -> None:
        """The segment state of this step, in place.

        Args:
            moment: (segments,).
            mean_square: (segments,), the mean of each segment's squared gradients, over all ranks that share it.
            scalars: from :meth:`scalars`.
        """
        raise NotImplementedError(f"{self.class_name} keeps no state per segment")


def rule_of_class(class_name: str) -> UpdateRule | None:
    """The rule of an optimizer by its class's name, as checkpoints tell it; None for one that is not of this package."""
    return next((rule for rule in RULES.values() if rule.class_name == class_name), None)
