"""A guard of a Trainer's run."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..blocks import BlockError
from ..measure import Guard, Unstable
from ..measure.guard import GuardOptions
from ..patches.transformers_losses import LOSSES
from .wrapped import blockwise_optimizer

_KEY = "blockwise_lr_guard"  # of the state in trainer_state.json


class GuardCallback(TrainerCallback):
    """``trainer.add_callback(GuardCallback(trainer, action="lower"))``: a :class:`~blockwise_lr.measure.Guard` that judges the
    loss of every optimizer step; what it has seen and done is in the checkpoints' trainer_state.json.

    Past a threshold it lowers the rates for a while, or has the Trainer save and stop; ``trainer.train()`` raises
    :class:`~blockwise_lr.measure.Unstable` then. To go back, start again with ``resume_from_checkpoint``.

    Args:
        trainer: that it is added to.
        options: those of :class:`~blockwise_lr.measure.guard.GuardOptions`.

    Raises:
        BlockError: an unknown option or a bad value, or the action ``roll_back``; when training starts, an optimizer that is no
            blockwise one.
    """

    def __init__(self, trainer: Any, **options: Any) -> None:
        checked = GuardOptions.checked(options, "guard: ")
        if checked.action == "roll_back" or checked.variance_ratio is not None:
            what = 'the action "roll_back"' if checked.action == "roll_back" else "variance_ratio"
            raise BlockError(
                f"GuardCallback does not offer {what}: the Trainer goes back by train(resume_from_checkpoint=...), and judges "
                f'losses alone; use "lower" or "stop", or blockwise_lr.deepspeed.guard in a loop of your own'
            )
        self.trainer, self.options = trainer, options
        self.guard: Guard | None = None
        self._loss: Any = None  # the sum of the micro batches' since the last step; the Trainer has divided them
        self._saves = False
        self._ended: Unstable | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Watches the run's losses from now on."""
        inner = blockwise_optimizer(optimizer, "GuardCallback")
        self.guard = Guard(inner, save=self._save, **self.options)
        if state.stateful_callbacks.get(_KEY):
            self.guard.load_state_dict(state.stateful_callbacks[_KEY])
        self._loss, self._saves, self._ended = None, False, None
        LOSSES.undo(self.trainer)
        LOSSES.apply(self.trainer, training_step=self._noting(self.trainer.training_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judges the step."""
        if self.guard is None:
            return
        loss, self._loss = self._loss, None
        self.guard.steps_done = state.global_step - 1
        try:
            self.guard.step(loss)
        except Unstable as error:
            if not self._saves:
                raise
            self._ended, control.should_save, control.should_training_stop = error, True, True
        finally:
            state.stateful_callbacks[_KEY] = self.guard.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watches no more; raises what ended the run."""
        LOSSES.undo(self.trainer)
        if self._ended is not None:
            raise self._ended

    def _save(self) -> None:
        """The Trainer saves after the callbacks of a step."""
        self._saves = True

    def _noting(self, step: Any) -> Any:
        def training_step(*arguments: Any, **keywords: Any) -> Any:
            loss = step(*arguments, **keywords)
            self._loss = loss if self._loss is None else self._loss + loss
            return loss

        return training_step
