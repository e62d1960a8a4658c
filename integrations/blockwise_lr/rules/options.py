"""The optimizers' options as one typed model: JSON, Python arguments, flags and param groups pass the same checks.

Values are not converted from other types: a number in quotes, a word for a truth value or a truth value for a number is
refused, because each of them usually means that something else was intended.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..blocks.presets import lr_ratios
from ..blocks.types import BlockError, BlockType, block_values, did_you_mean, finite, shown
from ..blocks.user_rules import own_blocks, user_rules

KERNELS = ("auto", "reference", "cpp", "triton")
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


def _positive(value: Any) -> float:
    number = as_number(value)
    if number <= 0:
        raise ValueError("give a finite number above 0")
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


def one_of(*names: str) -> BeforeValidator:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"use one of {', '.join(names)}")
        return value

    return BeforeValidator(check)


def own_of(info: ValidationInfo) -> Mapping[str, float | None]:
    """The user's own blocks, and the ratios that their rules state, in a check of options."""
    return info.context["own"] if info.context else {}


def ratios_of(value: Any, info: ValidationInfo) -> dict[str, float]:
    """Ratios by block type and own block, a preset's by the size of the model that is told in a check of options."""
    return {str(block): ratio for block, ratio in lr_ratios(value, own_of(info), _config_of(info)).items()}


def _config_of(info: ValidationInfo) -> Mapping[str, Any] | None:
    return info.context["config"] if info.context else None


def _decays(value: Any, info: ValidationInfo) -> dict[str, float]:
    found = block_values(value, "block_weight_decay", positive=False, own=own_of(info))
    return {str(block): decay for block, decay in found.items()}


def clip_limits(value: Any) -> dict[str, float | str]:
    """The option ``block_clip``, checked: block type -> norm, or a percentile as "90%"; one of them: of all block types.

    Raises:
        BlockError: an unknown block type, or a value that is neither.
    """
    if value is not None and not isinstance(value, Mapping):
        value = dict.fromkeys(BlockType, value)
    found: dict[str, float | str] = {}
    for block, limit in (value or {}).items():
        share = _percentile(limit)
        known = block_values({block: limit if share is None else share}, "block_clip", positive=True)
        found |= {str(name): number if share is None else f"{share:g}%" for name, number in known.items()}
    return found


def _percentile(limit: Any) -> float | None:
    """90.0 of "90%"; None of what is no text."""
    if not isinstance(limit, str):
        return None
    try:
        share = float(limit.strip().removesuffix("%")) if limit.strip().endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 100:
        raise BlockError(f'block_clip has {shown(limit)}; give a norm as a number, or a percentile as in "90%"')
    return share


def _rules(value: Any) -> Any:
    if value is not None and (isinstance(value, (str, Mapping)) or not isinstance(value, Iterable)):
        raise BlockError(
            f'block_rules is {shown(value)}; give a list of rules like {{"match": "*.adapter.*", "block": "ffn"}}'
        )
    rules = None if value is None else tuple(value)
    user_rules(rules)
    return rules


def _read(rules: Any) -> Any:
    """Rules that are read more than once."""
    return (
        rules if rules is None or isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable) else tuple(rules)
    )


def own_of_rules(rules: Any) -> dict[str, float | None]:
    """The own blocks of block_rules; none of rules that are refused for what they say."""
    try:
        return own_blocks(user_rules(rules))
    except BlockError:
        return {}


Rate = Annotated[Any, BeforeValidator(_rate)]
RateOrNone = Annotated[Any, BeforeValidator(lambda value: None if value is None else _at_least_0(value))]
Betas = Annotated[tuple[float, float], BeforeValidator(_betas)]
NotNegative = Annotated[float, BeforeValidator(_at_least_0)]
Truth = Annotated[bool, BeforeValidator(_truth)]


class CheckedOptions(BaseModel):
    """Pydantic, with errors that name the option, its value and how to mend it."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All options."""
        return tuple(cls.model_fields)

    @classmethod
    def checked(
        cls,
        values: Mapping[str, Any],
        where: str = "",
        own: Mapping[str, float | None] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Any:
        """The model of some options.

        Args:
            values: option -> value, as the user gave them.
            where: what they are the options of, for the error ("optimizer BlockwiseAdamW: ").
            own: the blocks of the user's own and the ratios that their rules state; None: those of ``block_rules``.
            config: the model's, where presets of ratios find its size.

        Raises:
            BlockError: an unknown option, or a bad value.
        """
        unknown = [name for name in values if name not in cls.model_fields]
        if unknown:
            raise BlockError(
                f"{where}unknown parameter {unknown[0]!r}{did_you_mean(unknown[0], cls.model_fields)}; "
                f"the valid ones are {', '.join(cls.names())}"
            )
        try:
            values = (
                {**values, "block_rules": _read(values["block_rules"])} if "block_rules" in values else dict(values)
            )
            made = own_of_rules(values.get("block_rules")) if own is None else own
            return cls.model_validate(values, context={"own": made, "config": config})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raised = problem.get("ctx", {}).get("error")
            text = str(raised) if raised is not None else problem["msg"]
            if isinstance(raised, BlockError) or not problem["loc"]:  # it names what it is about
                raise BlockError(where + text) from None
            name, verb = problem["loc"][0], "are" if problem["loc"][0] == "betas" else "is"
            raise BlockError(f"{where}{name} {verb} {shown(problem['input'])}; {text}") from None


class GroupOptions(CheckedOptions):
    """What a param group may say for itself, and what the optimizer says for all groups, whatever its rule."""

    lr: Annotated[Rate, Field(description="the base learning rate, that of block types of ratio 1")] = 1e-3
    weight_decay: Annotated[NotNegative, Field(description="decoupled; not applied to norms and biases by default")] = (
        0.1
    )
    block_lr_ratios: Annotated[
        dict[str, float],
        BeforeValidator(ratios_of),
        Field(
            description="peak learning rate of block types over ``lr``; those not named keep the default's (embedding 10, "
            "which the head follows, all else 1), own blocks their rule's. Or the name of a preset (see "
            ":mod:`blockwise_lr.blocks.presets`), ``paper`` for those of Blockwise LR, alone or as ``preset`` beside ratios"
        ),
    ] = {}
    block_weight_decay: Annotated[
        dict[str, float],
        BeforeValidator(_decays),
        Field(description="weight decay of block types and own blocks, in place of ``weight_decay``"),
    ] = {}
    decay_norms_and_biases: Annotated[Truth, Field(description="decay everything, as the paper's experiments do")] = (
        False
    )
    min_lr: Annotated[
        RateOrNone,
        Field(
            description="what :class:`~blockwise_lr.schedules.BlockwiseWarmupCosine` lets all block types decay to; lr / 20 "
            "by default. Other schedulers do not use it"
        ),
    ] = None

    @model_validator(mode="after")
    def _min_below_lr(self) -> GroupOptions:
        if self.min_lr is not None and self.min_lr > float(self.lr):
            raise BlockError(f"min_lr is {self.min_lr!r} and lr is {float(self.lr)!r}; give a min_lr from 0 up to lr")
        return self


class OptimizerOptions(GroupOptions):
    """The options of every rule, by the names that JSON, flags and Python share. A rule's own come with its file."""

    # options of the optimizer as a whole, which param groups cannot have
    NOT_OF_GROUPS: ClassVar[tuple[str, ...]] = (
        "block_rules",
        "block_strict",
        "kernel",
        "accept_mismatch",
        "ratio_fade_steps",
        "adamw_lr",
        "block_clip",
        "grad_power",
    )

    # whether a good rate of AdamW's says anything about one of this rule's
    FOLLOWS_ADAMW: ClassVar[bool] = True

    block_rules: Annotated[
        Any,
        BeforeValidator(_rules),
        Field(description="rules of your own for blocks and rates, where no block_map is given"),
    ] = None
    block_strict: Annotated[
        Truth, Field(description="refuse parameters that no rule maps, where a framework's integration makes the map")
    ] = True
    kernel: Annotated[
        str,
        one_of(*KERNELS),
        Field(description='"auto", or a kernel\'s name (see :mod:`blockwise_lr.kernels`)'),
    ] = "auto"
    adamw_lr: Annotated[
        RateOrNone,
        Field(
            description="in place of ``lr``: the learning rate of an AdamW run that this one follows; ``lr`` becomes "
            "adamw_lr over the ffn's ratio, so that most weights train at AdamW's rate"
        ),
    ] = None
    accept_mismatch: Annotated[
        tuple[str, ...],
        Field(
            description="in what a loaded checkpoint may contradict this run, which goes on with its own settings then: any of "
            "optimizer, block_map, block_lr_ratios and the other settings' names. Nothing by default"
        ),
    ] = ()
    block_clip: Annotated[
        dict[str, float | str],
        BeforeValidator(clip_limits),
        Field(
            description="largest gradient norm of block types, each over all of the model, beside what a framework clips "
            'globally before; or as "90%" that percentile of the block type\'s last 1,000 norms; one value: of every block '
            "type. Nothing by default"
        ),
    ] = {}
    grad_power: Annotated[
        float,
        BeforeValidator(_positive),
        Field(
            description="GradPower (arXiv 2505.24275): steps take sign(g) |g|^p, after clipping; 1: off. Not for Adam-mini"
        ),
    ] = 1.0
    ratio_fade_steps: Annotated[
        int,
        BeforeValidator(_steps),
        Field(
            description="over how many optimizer steps accepted new ratios take over from the checkpoint's (from 1 where it is "
            "a plain AdamW's); 0: at once"
        ),
    ] = 0

    @model_validator(mode="before")
    @classmethod
    def _lr_from_adamw(cls, values: Any, info: ValidationInfo) -> Any:
        if not cls.FOLLOWS_ADAMW and values.get("adamw_lr") is not None:
            raise BlockError(
                f"adamw_lr is {shown(values['adamw_lr'])}, and the rates of this optimizer do not follow from AdamW's; give lr"
            )
        return with_base_lr(values, own_of(info), _config_of(info))

    @field_validator("accept_mismatch", mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> tuple[str, ...]:
        if not isinstance(value, (str, list, tuple, set, frozenset)):
            raise ValueError('give a list of names, as in ["block_lr_ratios"]')
        return checked_accepts(value, cls.acceptable())

    @classmethod
    def group_names(cls) -> tuple[str, ...]:
        """The options that a param group may have for itself."""
        return tuple(name for name in cls.names() if name not in cls.NOT_OF_GROUPS)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All options: ``lr``, the rule's own, and those of every rule."""
        own = [name for name in cls.model_fields if name not in OptimizerOptions.model_fields]
        return tuple(dict.fromkeys(["lr", *own, *cls.model_fields]))

    @classmethod
    def acceptable(cls) -> tuple[str, ...]:
        """What accept_mismatch may name."""
        segments = [name for name in cls.NOT_OF_GROUPS if name not in OptimizerOptions.NOT_OF_GROUPS]
        return ("optimizer", "block_map", *segments, *cls.group_names())

    def group_defaults(self) -> dict[str, Any]:
        """The defaults of a param group: plain numbers and strings, so that a state dict stays loadable everywhere."""
        found = {name: getattr(self, name) for name in self.group_names() if name != "min_lr"}
        # not "min_lr": torch's OneCycleLR keeps a number of its own under that key
        return {**found, "block_min_lr": self.min_lr, "group_decay": False}

    @classmethod
    def checked_group(
        cls,
        group: Mapping[str, Any],
        lr: Any,
        where: str,
        own: Mapping[str, float | None] = MappingProxyType({}),
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a param group says for itself, checked as the optimizer's own options are; ratios are filled up.

        Args:
            group: a param group; keys that are no options (frameworks add their own) are passed over.
            lr: the rate that holds where the group has none.
            where: which group, for the error.
            own, config: as for :meth:`checked`.

        Raises:
            BlockError: a bad value, an option of torch's Adam that is not offered here, or a misspelt name of one that
                is.
        """
        for name in _NOT_OFFERED:
            if group.get(name):
                raise BlockError(
                    f"{where}{name} is {shown(group[name])}, which blockwise optimizers do not offer; leave it out"
                )
        names = cls.group_names()
        for name in group:
            close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.85)
            if close and name not in names:
                raise BlockError(
                    f"{where}unknown parameter {name!r} (did you mean {close[0]!r}?); the valid ones are {', '.join(names)}"
                )
        said = {name: group[name] for name in names if name in group}
        if "block_lr_ratios" not in said:  # which are the optimizer's then, and complete
            own = {name: 1.0 for name in own}
        checked = cls.checked({"lr": lr, **said} if "min_lr" in said else said, where, own, config)
        return {name: getattr(checked, name) for name in said}


FROM_ADAMW = "from_adamw"


def with_base_lr(
    values: Mapping[str, Any],
    own: Mapping[str, float | None] = MappingProxyType({}),
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Options with the ``lr`` that follows from ``adamw_lr``, where that is given.

    The rate of the FFN, which has most of the weights, is AdamW's. Where that was right and where not is tabled in
    examples/reproduce.

    Raises:
        BlockError: ``lr`` is given as well, or asked to follow and ``adamw_lr`` is not there.
    """
    given = values.get("adamw_lr")
    if given is None:
        if isinstance(values.get("lr"), str) and values["lr"] == FROM_ADAMW:
            raise BlockError(
                f"lr is {FROM_ADAMW!r} and adamw_lr is not given; add adamw_lr, the rate of your AdamW run"
            )
        return dict(values)
    if values.get("lr", FROM_ADAMW) != FROM_ADAMW:
        raise BlockError(
            f"lr is {shown(values['lr'])} and adamw_lr {shown(given)}; give one of them: lr is what ratios multiply, "
            f"adamw_lr the rate of an AdamW run, which lr is derived from"
        )
    try:
        rate = _at_least_0(given)
    except ValueError as error:
        raise BlockError(f"adamw_lr is {shown(given)}; {error}") from None
    return {**values, "lr": rate / lr_ratios(values.get("block_lr_ratios"), own, config)[BlockType.FFN]}


def checked_accepts(given: Any, known: Iterable[str]) -> tuple[str, ...]:
    """An ``accept_mismatch``, checked.

    Raises:
        BlockError: an unknown name; the message lists those there are.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    known = tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BlockError(f"accept_mismatch names {unknown[0]!r}; use any of {', '.join(known)}")
    return names
