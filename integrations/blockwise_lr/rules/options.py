"""The optimizers' options as one typed model: JSON, Python arguments, flags and param groups pass the same checks.

Values are not converted from other types: a number in quotes, a word for a truth value or a truth value for a number is
refused, because each of them usually means that something else was intended.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from ..blocks.rules import user_rules
from ..blocks.types import BlockError, block_values, finite, lr_ratios, shown
from ..checkpoint.record import checked_accepts
from ..kernels import KERNELS

BIAS_SEGMENTS = ("element", "vector")
# Options of torch's Adams that change the update; a param group that asks for one of them must not train without it.
_NOT_OFFERED = ("amsgrad", "maximize", "capturable", "differentiable", "fused")


def as_number(value: Any) -> float:
    """A finite float of a number (Python's, numpy's, or a tensor of one element).

    Raises:
        ValueError: says what is given in its place and how to write it.
    """
    if isinstance(value, str):
        raise ValueError("this is text, so write the number without quotes (JSON takes 1e-4)")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    number = finite(value)
    if number is None:
        raise ValueError("give a finite number")
    return number


def _at_least_0(value: Any) -> float:
    number = as_number(value)
    if number < 0:
        raise ValueError("give a finite number, 0 or above")
    return number


def _rate(value: Any) -> Any:
    """A learning rate; a tensor stays one, as torch.optim keeps it."""
    number = _at_least_0(value)
    return value if isinstance(value, torch.Tensor) else number


def _betas(value: Any) -> tuple[float, float]:
    try:
        if isinstance(value, (str, Mapping)):
            raise ValueError
        first, second = (as_number(beta) for beta in value)
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("give two numbers, 0 or above and below 1, as in [0.9, 0.95]") from None
    return first, second


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("write true or false, without quotes (True or False in Python)")
    return value


def _steps(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("give a whole number of optimizer steps, 0 or above")
    return value


def _one_of(*names: str) -> BeforeValidator:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"use one of {', '.join(names)}")
        return value

    return BeforeValidator(check)


def _ratios(value: Any) -> dict[str, float]:
    return {block.value: ratio for block, ratio in lr_ratios(value).items()}


def _decays(value: Any) -> dict[str, float]:
    return {block.value: decay for block, decay in block_values(value, "block_weight_decay", positive=False).items()}


def _rules(value: Any) -> Any:
    if value is not None and (isinstance(value, (str, Mapping)) or not isinstance(value, Iterable)):
        raise BlockError(
            f'block_rules is {shown(value)}; give a list of rules like {{"match": "*.adapter.*", "block": "ffn"}}'
        )
    rules = None if value is None else tuple(value)
    user_rules(rules)
    return rules


def _accepts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (str, list, tuple, set, frozenset)):
        raise ValueError('give a list of names, as in ["block_lr_ratios"]')
    return checked_accepts(value)


Rate = Annotated[Any, BeforeValidator(_rate)]
NotNegative = Annotated[float, BeforeValidator(_at_least_0)]
Truth = Annotated[bool, BeforeValidator(_truth)]


class _Checked(BaseModel):
    """Pydantic, with errors that name the option, its value and how to mend it."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: str = "") -> Any:
        """The model of some options.

        Args:
            values: option -> value, as the user gave them.
            where: what they are the options of, for the error ("optimizer BlockwiseAdamW: ").

        Raises:
            BlockError: an unknown option, or a bad value.
        """
        unknown = [name for name in values if name not in cls.model_fields]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), cls.model_fields, n=1)
            raise BlockError(
                f"{where}unknown parameter {unknown[0]!r}{f' (did you mean {close[0]!r}?)' if close else ''}"
                f"; the valid ones are {', '.join(cls.model_fields)}"
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raised = problem.get("ctx", {}).get("error")
            text = str(raised) if raised is not None else problem["msg"]
            if isinstance(raised, BlockError) or not problem["loc"]:  # it names what it is about
                raise BlockError(where + text) from None
            name, verb = problem["loc"][0], "are" if problem["loc"][0] == "betas" else "is"
            raise BlockError(f"{where}{name} {verb} {shown(problem['input'])}; {text}") from None


class GroupOptions(_Checked):
    """What a param group may say for itself, and what the optimizer says for all groups."""

    lr: Rate = 1e-3
    betas: Annotated[tuple[float, float], BeforeValidator(_betas)] = (0.9, 0.95)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.1
    block_lr_ratios: Annotated[dict[str, float], BeforeValidator(_ratios)] = {}
    block_weight_decay: Annotated[dict[str, float], BeforeValidator(_decays)] = {}
    decay_norms_and_biases: Truth = False
    min_lr: Annotated[Any, BeforeValidator(lambda value: None if value is None else _at_least_0(value))] = None

    @model_validator(mode="after")
    def _min_below_lr(self) -> GroupOptions:
        if self.min_lr is not None and {"lr", "min_lr"} <= self.model_fields_set and self.min_lr > float(self.lr):
            raise BlockError(f"min_lr is {self.min_lr!r} and lr is {float(self.lr)!r}; give a min_lr from 0 up to lr")
        return self


class OptimizerOptions(GroupOptions):
    """All options of BlockwiseAdamW, by the names that JSON and Python share."""

    block_rules: Annotated[Any, BeforeValidator(_rules)] = None
    block_strict: Truth = True
    kernel: Annotated[str, _one_of(*KERNELS)] = "auto"
    accept_mismatch: Annotated[tuple[str, ...], BeforeValidator(_accepts)] = ()
    ratio_fade_steps: Annotated[int, BeforeValidator(_steps)] = 0

    # those that become the defaults of param groups
    GROUP: ClassVar[tuple[str, ...]] = tuple(GroupOptions.model_fields)

    def group_defaults(self) -> dict[str, Any]:
        """The defaults of a param group: plain numbers and strings, so that a state dict stays loadable everywhere."""
        found = {name: getattr(self, name) for name in self.GROUP if name != "min_lr"}
        # not "min_lr": torch's OneCycleLR keeps a number of its own under that key
        return {**found, "block_min_lr": self.min_lr, "group_decay": False}


class AdamMiniOptions(OptimizerOptions):
    """Those of BlockwiseAdamMini."""

    bias_segments: Annotated[str, _one_of(*BIAS_SEGMENTS)] = "element"


def checked_group(group: Mapping[str, Any], lr: Any, where: str) -> dict[str, Any]:
    """What a param group says for itself, checked as the optimizer's own options are; ratios are filled up.

    Args:
        group: a param group; keys that are no options (frameworks add their own) are passed over.
        lr: the rate that holds where the group has none.
        where: which group, for the error.

    Raises:
        BlockError: a bad value, an option of torch's Adam that is not offered here, or a misspelt name of one that is.
    """
    for name in _NOT_OFFERED:
        if group.get(name):
            raise BlockError(
                f"{where}{name} is {shown(group[name])}, which blockwise optimizers do not offer; leave it out"
            )
    for name in group:
        close = difflib.get_close_matches(str(name), OptimizerOptions.GROUP, n=1, cutoff=0.85)
        if close and name not in OptimizerOptions.GROUP:
            raise BlockError(
                f"{where}unknown parameter {name!r} (did you mean {close[0]!r}?); the valid ones are "
                f"{', '.join(OptimizerOptions.GROUP)}"
            )
    said = {name: group[name] for name in OptimizerOptions.GROUP if name in group}
    checked = GroupOptions.checked({"lr": lr, **said} if "min_lr" in said else said, where)
    return {name: getattr(checked, name) for name in said}
