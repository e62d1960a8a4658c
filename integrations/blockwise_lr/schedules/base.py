"""The schedulers: a curve on an optimizer, in torch's LRScheduler convention and as DeepSpeed's scheduler types."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..blocks.layout import Rate
from ..blocks.types import BlockError, shown
from ..rules.options import as_number
from ..rules.param_groups import group_lr, ratio_now, set_lr, state_block_lrs
from .curves import Curve

log = logging.getLogger("blockwise_lr")

_POSITION = ("last_batch_iteration", "tokens", "block_lrs", "start_lrs")
# what states of 0.3 and before, which were of one class, do not say
_OLDEST = "BlockwiseWarmupCosine"


class BlockwiseSchedule(LRScheduler):
    """Base of the schedulers: sets ``lr`` of every param group, the base rate, and the rate of every block type.

    For optimizers that are not blockwise it sets ``lr`` alone. The peak is ratio x the learning rate that the optimizer was
    built with, even if its state was loaded before; a block type whose peak is below min_lr stays at its peak. One call of
    ``step`` per optimizer step.

    Attributes:
        curve: its settings and formula.
    """

    curve_type: ClassVar[type[Curve]]
    curve: Curve

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "curve_type" in vars(cls):
            cls.__signature__ = _signature(cls.curve_type)  # type: ignore[attr-defined]
            cls.__doc__ = _documentation(cls)

    def __init__(self, optimizer: Any, *positional: Any, **settings: Any) -> None:
        name, inner = type(self).__name__, torch_optimizer(optimizer, type(self).__name__)
        bound = self.__signature__.bind(inner, *positional, **settings).arguments
        del bound["optimizer"]
        done = bound.pop("last_batch_iteration", -1)
        if isinstance(done, bool) or not isinstance(done, int) or done < -1:
            raise BlockError(
                f"{name}: last_batch_iteration is {shown(done)}; give a whole number of optimizer steps, -1 or above"
            )
        betas = inner.param_groups[0].get("betas") if inner.param_groups else None
        try:
            self.curve = self.curve_type.checked(bound).with_warmup(float(betas[1]) if betas else None)
            for group in inner.param_groups:
                self.curve.refuse_long_warmups(_ratios(group) or {"": 1.0})
        except BlockError as error:
            raise BlockError(f"{name}: {error}") from None
        for group, peak in zip(inner.param_groups, _peaks(inner)):
            group["initial_lr"] = peak
        self.min_lrs = [self._group_min_lr(group) for group in inner.param_groups]
        self.start_lrs = self._first_starts(inner)
        self._more_tokens, self._step_tokens = 0, self._usual
        super().__init__(inner, done)
        self._resumed = False  # a state was loaded and no step taken since
        loaded = weakref.WeakMethod(self._optimizer_was_loaded)  # frameworks load the optimizer after its scheduler
        inner.register_load_state_dict_post_hook(lambda _: None if (told := loaded()) is None else told())

    def __getattr__(self, name: str) -> Any:
        """A setting of the curve, as ``total_num_steps``."""
        curve = self.__dict__.get("curve")
        if curve is not None and name in type(curve).model_fields:
            return getattr(curve, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # ---- where it is

    @property
    def last_batch_iteration(self) -> int:
        """Number of completed optimizer steps minus one."""
        return self.last_epoch - 1

    @property
    def _usual(self) -> int:
        return self.curve.tokens_per_step or 1

    @property
    def tokens(self) -> int:
        """Seen by the completed steps, where lengths count tokens."""
        return self.last_epoch * self._usual + self._more_tokens

    @property
    def position(self) -> int:
        """What the curve is asked for: the number of the next optimizer step, or the tokens seen once it is done, if it
        has as many as the last one."""
        if self.curve.tokens_per_step is None:
            return self.last_epoch + 1
        return self.tokens + self._step_tokens

    @property
    def peaks(self) -> list[float]:
        """The peak of each param group's base learning rate."""
        return [float(lr) for lr in self.base_lrs]

    def step(self, last_batch_iteration: int | None = None, *, tokens: int | None = None) -> None:
        """Advances by one optimizer step, or to the given ``last_batch_iteration``.

        Args:
            last_batch_iteration: completed optimizer steps minus one.
            tokens: of the step that was taken, where lengths count tokens; tokens_per_step where it is not said.

        Raises:
            BlockError: tokens that are no whole number, 0 or above, or of a schedule whose lengths count steps.
        """
        if tokens is not None and (not isinstance(tokens, int) or tokens < 0 or self.curve.tokens_per_step is None):
            raise BlockError(
                f"{type(self).__name__}: step was told of {shown(tokens)} tokens; give a whole number, and tokens_per_step to "
                f"the schedule so that its lengths count tokens"
            )
        if last_batch_iteration is not None:
            self.last_epoch, self._more_tokens = last_batch_iteration, 0
        self._resumed = False
        self._step_tokens = self._usual if tokens is None else tokens
        self._more_tokens += self._step_tokens - self._usual
        super().step()
        self._state_block_lrs()

    # ---- rates

    def get_lr(self) -> list[float | torch.Tensor]:
        """The base learning rate (ratio 1) of each param group for the next optimizer step."""
        return list(self._base_lrs())

    def _base_lrs(self) -> list[float]:
        at = self.position
        return [
            self.curve.base_rate(at, peak, low, starts.get("", 0.0))
            for peak, low, starts in zip(self.peaks, self.min_lrs, self.start_lrs)
        ]

    def _update_lr(self, epoch: int | None = None) -> None:  # torch's SequentialLR calls it instead of step
        super()._update_lr(epoch)
        self._state_block_lrs()

    def _state_block_lrs(self) -> None:
        at = self.position
        for group, peak, low, starts in zip(self.optimizer.param_groups, self.peaks, self.min_lrs, self.start_lrs):
            ratios = _ratios(group)
            if ratios:
                state_block_lrs(group, self.curve.rates(at, peak, low, ratios, starts))

    def _first_starts(self, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
        """Per param group, where the warmup of each block type begins ("": of the base rate)."""
        return [{} for _ in optimizer.param_groups]

    def _group_min_lr(self, group: dict[str, Any]) -> float:
        peak = float(group["initial_lr"])
        value = self.curve.min_lr if self.curve.min_lr is not None else group.get("block_min_lr")
        value = peak / self.curve.floor_share if value is None else value
        try:
            number = as_number(value)
        except ValueError:
            number = -1.0
        name = type(self).__name__
        if not 0 <= number <= peak:
            raise BlockError(f"{name}: min_lr is {shown(value)} and lr is {peak!r}; give a min_lr from 0 up to lr")
        try:
            self.curve.refuse_low(number)
        except BlockError as error:
            raise BlockError(f"{name}: {error}") from None
        return number

    # ---- saving

    def _settings(self) -> dict[str, Any]:
        """What a resumed run is compared in."""
        given = self.curve.given()
        return {
            **{name: value for name, value in given.items() if name != "min_lr"},
            "peaks": self.peaks,
            "min_lrs": self.min_lrs,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, the rates, and the settings, which :meth:`load_state_dict` compares with its own."""
        return {
            "schedule": type(self).__name__,
            "last_batch_iteration": self.last_batch_iteration,
            "tokens": self.tokens,
            "block_lrs": [rates_now(group) for group in self.optimizer.param_groups],
            "start_lrs": self.start_lrs,
            **self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step with this scheduler's own settings; logs those that differ from the saved ones.

        The state may be another blockwise schedule's: its position counts.

        Raises:
            BlockError: ``state_dict`` is not the state of a blockwise schedule.
        """
        name = type(self).__name__
        saved = state_dict.get("last_batch_iteration") if isinstance(state_dict, Mapping) else None
        if not isinstance(saved, int):
            raise BlockError(
                f"the checkpoint's scheduler state does not say where {name} is to go on (it was "
                "saved without a scheduler, or with another); load with load_lr_scheduler_states=False and "
                "call the scheduler's step(last_batch_iteration=optimizer steps done - 1)"
            )
        self._take_over(state_dict)
        kind = state_dict.get("schedule", _OLDEST)
        if kind != name:
            log.warning("%s goes on at the position of the checkpoint's %s, with its own settings", name, kind)
        for key, now in self.state_dict().items() if kind == name else ():
            if key not in _POSITION and state_dict.get(key, now) != now:
                log.warning("%s goes on with %s = %s; the checkpoint had %s", name, key, now, state_dict[key])
        self.last_epoch = saved + 1
        counted = state_dict.get("tokens_per_step") is not None
        self._more_tokens = state_dict["tokens"] - self.last_epoch * self._usual if counted else 0
        self._step_tokens = self._usual
        self._resumed = True
        self.set_rates()

    def _optimizer_was_loaded(self) -> None:
        """States rates again over those that came with an optimizer's state, which may be of another schedule."""
        if self._resumed:
            self.set_rates()

    def set_rates(self) -> None:
        """Sets the rates of the step that is next, as after a change of the settings."""
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs()):
            set_lr(group, lr)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._state_block_lrs()

    def _take_over(self, state_dict: Mapping[str, Any]) -> None:
        """What a kind of schedule takes of a saved state beside its position.

        Raises:
            BlockError: the saved position contradicts the settings.
        """


def torch_optimizer(optimizer: Any, what: str) -> torch.optim.Optimizer:
    """The torch optimizer inside a framework's wrappers."""
    found = optimizer
    while not isinstance(found, torch.optim.Optimizer) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, torch.optim.Optimizer):
        raise BlockError(f"{what} needs a torch optimizer, got {type(optimizer).__name__}")
    return found


def _peaks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The learning rates the optimizer was built with; after loading, ``lr`` is that of the saved step."""
    built = getattr(optimizer, "built_lrs", None)
    return [
        group.get("initial_lr", group["lr"] if built is None else lr)
        for group, lr in zip(optimizer.param_groups, built or [None] * len(optimizer.param_groups))
    ]


def _ratios(group: Mapping[str, Any]) -> dict[str, float] | None:
    """A group's ratios in force now; None for that of an optimizer that is not blockwise."""
    ratios = group.get("block_lr_ratios")
    return {block: ratio_now(group, block) for block in ratios} if ratios else None


def rates_now(group: Mapping[str, Any]) -> dict[str, float]:
    """The rates of a group's block types; "": its base rate."""
    rates = {block: group_lr(group, Rate(block)) for block in group.get("block_lr_ratios") or ()}
    return {"": float(group["lr"]), **rates}


def _signature(curve: type[Curve]) -> inspect.Signature:
    """That of a class whose settings are a curve's."""
    kind, fields = inspect.Parameter, curve.model_fields

    def parameter(name: str, where: Any) -> inspect.Parameter:
        return kind(name, where, default=kind.empty if fields[name].is_required() else fields[name].default)

    return inspect.Signature(
        [
            kind("optimizer", kind.POSITIONAL_OR_KEYWORD),
            *(parameter(name, kind.POSITIONAL_OR_KEYWORD) for name in curve.positional),
            kind(
                "last_batch_iteration",
                kind.POSITIONAL_OR_KEYWORD if curve.positional else kind.KEYWORD_ONLY,
                default=-1,
            ),
            *(parameter(name, kind.KEYWORD_ONLY) for name in fields if name not in curve.positional),
        ]
    )


def _documentation(cls: type[BlockwiseSchedule]) -> str:
    curve = cls.curve_type
    lines = [f"    {name}: {field.description}." for name, field in curve.model_fields.items()]
    text = inspect.cleandoc(cls.__doc__ or curve.__doc__ or "")
    return (
        f"{text}\n\nArgs:\n    optimizer: a torch optimizer, or DeepSpeed's wrapper of one.\n"
        + "\n".join(lines)
        + "\n    last_batch_iteration: number of completed optimizer steps minus one; -1 for a fresh start.\n\n"
        "Raises:\n    BlockError: counts that are not whole or out of range, or a min_lr above a group's lr.\n"
    )
