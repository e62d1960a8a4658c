"""Guard: what a run does by itself when its loss or Adam's variance says that it becomes unstable."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field

from ..blocks import BlockError
from ..collective import is_rank_zero
from ..optim.base import BlockwiseOptimizer
from ..optim.clipping import device_of
from ..rules.options import CheckedOptions, one_of
from .loss_ratio import LossRatio, plain

log = logging.getLogger("blockwise_lr")

ACTIONS = ("lower", "roll_back", "stop")


class Unstable(RuntimeError):
    """A guarded run is to end; raised on every rank alike."""


class GuardOptions(CheckedOptions):
    """The thresholds of a guard, and what it does."""

    action: Annotated[
        str,
        one_of(*ACTIONS),
        Field(
            description="``lower`` the rates for a while, ``roll_back`` to the newest complete checkpoint and go on with the "
            "data after it, or ``stop``, the state saved"
        ),
    ] = "lower"
    loss_ratio: Annotated[
        float, Field(gt=1, description="a step's loss over the lowest before it; above it the guard acts")
    ] = 1.5
    variance_ratio: Annotated[
        float | None,
        Field(gt=1, description="the same for the largest second moment of a block type, as often as it is reported"),
    ] = None
    after: Annotated[
        int, Field(ge=0, description="steps from the first that are not judged: losses fall and jump there")
    ] = 100
    factor: Annotated[float, Field(gt=0, lt=1, description="of the rates, when they are lowered")] = 0.5
    steps: Annotated[
        int, Field(ge=1, description="for how many steps; also how long after an action nothing but NaN is judged")
    ] = 100
    attempts: Annotated[
        int,
        Field(
            ge=1,
            description="how often in a row rates are lowered (each time within twice ``steps`` of the last) or one "
            "checkpoint is gone back to, before the run stops",
        ),
    ] = 3


@dataclass(frozen=True)
class Alarm:
    """What a guard saw, and what it did.

    Attributes:
        step: the optimizer step, from 1.
        reason: in a sentence.
        action: one of ``ACTIONS``.
        back_to: the step that the run went on from, where it was rolled back.
    """

    step: int
    reason: str
    action: str
    back_to: int | None = None


class Guard:
    """Judges every step's loss, and acts past thresholds; all ranks decide alike, by one all-reduce of three numbers a step.

    After every optimizer step call :meth:`step`. A loss that is not finite on any rank is past every threshold: rates are
    not lowered then, for the weights may hold it too, but the run is rolled back, or stops without a save.

    Args:
        optimizers: of one model: one, or all that Megatron chains.
        roll_back: loads the newest complete checkpoint and returns its step; needed by the action ``roll_back``.
        save: saves the run's state; called before it stops.
        group: ranks whose losses are averaged; all by default.
        options: those of :class:`GuardOptions`.

    Attributes:
        alarms: all so far.
        skipped: steps that were taken and thrown away by rolling back: a loader that counts batches by the step reads
            ``step + skipped``.

    Raises:
        BlockError: an unknown option or a bad value; ``roll_back`` without a way to do so.
    """

    def __init__(
        self,
        *optimizers: BlockwiseOptimizer,
        roll_back: Callable[[], int] | None = None,
        save: Callable[[], Any] | None = None,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self.options = GuardOptions.checked(options, "guard: ")
        if self.options.action == "roll_back" and roll_back is None:
            raise BlockError(
                'guard: action "roll_back" needs a folder of checkpoints to go back to; name it, or use "lower"'
            )
        self._optimizers, self._roll_back, self._save, self._group = optimizers, roll_back, save, group
        self.loss_ratio = LossRatio()
        self._variances: dict[str, float] = {}  # the lowest so far
        self.steps_done, self.skipped = 0, 0
        self._quiet_until, self._in_a_row, self._last = 0, 0, -math.inf
        self.alarms: list[Alarm] = []

    def step(self, loss: float | torch.Tensor | None, figures: Mapping[str, float] | None = None) -> Alarm | None:
        """Judges a step that was taken. All ranks call it.

        Args:
            loss: this rank's of the step; None where it has none, as before the last pipeline stage.
            figures: what a :class:`~blockwise_lr.measure.BlockMonitor` has reported of the step, where it has.

        Returns:
            What was seen and done; None where nothing was.

        Raises:
            Unstable: the run is to end.
        """
        self.steps_done += 1
        found = self._mean(loss)
        if found is None:
            return None
        mean, is_finite = found
        reason = self._judged(mean, is_finite, figures or {})
        if reason is None:
            return None
        return self._act(reason, is_finite)

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen and done, as plain values."""
        return {
            "steps_done": self.steps_done,
            "skipped": self.skipped,
            "quiet_until": self._quiet_until,
            "in_a_row": self._in_a_row,
            "last": self._last,
            "loss_ratio": self.loss_ratio.state_dict(),
            "variances": dict(self._variances),
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was saved."""
        self.steps_done, self.skipped = state["steps_done"], state["skipped"]
        self._quiet_until, self._in_a_row, self._last = state["quiet_until"], state["in_a_row"], state["last"]
        self.loss_ratio.load_state_dict(state["loss_ratio"])
        self._variances = dict(state["variances"])
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]

    def _mean(self, loss: float | torch.Tensor | None) -> tuple[float, bool] | None:
        """The mean loss of the ranks that have one, and whether all of theirs are finite; None where no rank has one."""
        value = None if loss is None else plain(loss)
        finite = value is not None and math.isfinite(value)
        if not dist.is_initialized():
            return None if value is None else (value, finite)
        told = torch.tensor([value if finite else 0.0, float(finite), float(value is not None)], dtype=torch.float64)
        told = told.to(device_of([self._group]))
        dist.all_reduce(told, group=self._group)
        total, count, ranks = told.tolist()
        return ((total / count if count else math.nan), count == ranks) if ranks else None

    def _judged(self, mean: float, is_finite: bool, figures: Mapping[str, float]) -> str | None:
        """What is past a threshold, in a sentence."""
        if not is_finite:
            return "the loss is not finite on a rank"
        ratio = self.loss_ratio.add(mean)
        is_quiet = self.steps_done <= max(self.options.after, self._quiet_until)
        found = None
        if ratio > self.options.loss_ratio:
            found = f"the loss {mean:.4g} is {ratio:.3g} times the lowest before it"
        for name, value in figures.items():
            kind, _, block = name.partition("/")
            if kind != "variance_max" or self.options.variance_ratio is None:
                continue
            lowest = min(value, self._variances.get(block, value)) if value > 0 else math.inf
            if value > self.options.variance_ratio * lowest:
                found = found or (
                    f"the largest second moment of {block} is {value / lowest:.3g} times the lowest reported before it"
                )
            if math.isfinite(lowest):
                self._variances[block] = lowest
        return None if is_quiet else found

    def _act(self, reason: str, is_finite: bool) -> Alarm:
        action = self.options.action
        if action == "stop" or (action == "lower" and not is_finite):
            raise self._stopped(reason, is_finite)
        alarm, done = self._lowered(reason) if action == "lower" else self._rolled_back(reason)
        self.alarms.append(alarm)
        if is_rank_zero():
            log.warning("guard: step %d: %s: %s", alarm.step, reason, done)
        return alarm

    def _lowered(self, reason: str) -> tuple[Alarm, str]:
        step, of = self.steps_done, self.options
        self._count(step - self._last <= 2 * of.steps)
        if self._in_a_row > of.attempts:
            raise self._stopped(f"{reason}, though rates were lowered {of.attempts} times", True)
        self._last, self._quiet_until = step, step + of.steps
        for optimizer in self._optimizers:
            optimizer.lower_lrs(of.factor, of.steps)
        return Alarm(step, reason, "lower"), f"rates times {of.factor:g} for {of.steps} steps"

    def _rolled_back(self, reason: str) -> tuple[Alarm, str]:
        assert self._roll_back is not None
        now, step = self.state_dict(), self.steps_done
        back_to = self._roll_back()
        self.load_state_dict({**now, "steps_done": back_to})  # what was loaded may hold an older one
        self.skipped += step - back_to
        self._count(back_to == self._last)
        self._last = back_to
        if self._in_a_row > self.options.attempts:
            raise self._stopped(
                f"{reason} at step {step}, {self._in_a_row} times after step {back_to}, which was gone back to", False
            )
        return (
            Alarm(step, reason, "roll_back", back_to),
            f"rolled back to step {back_to}, and the data of {step - back_to} steps is skipped",
        )

    def _count(self, is_in_a_row: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if is_in_a_row else 1

    def _stopped(self, reason: str, saves: bool) -> Unstable:
        self.alarms.append(Alarm(self.steps_done, reason, "stop"))
        saved = "nothing is saved, the newest checkpoint holds"
        if saves and self._save is not None:
            self._save()
            saved = "the state is saved"
        return Unstable(f"guard: step {self.steps_done}: {reason}; the run stops, {saved}")
