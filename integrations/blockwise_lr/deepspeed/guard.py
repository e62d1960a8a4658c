"""The guard of a DeepSpeed engine: it goes back to the engine's own checkpoints, and what it did is saved with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from weakref import ref

from ..blocks import BlockError
from ..checkpoint import CheckpointError
from ..measure import Alarm, Guard
from ..patches.deepspeed_instances import GUARDED_CHECKPOINTS
from .checkpoint import load_newest
from .client_state import keep_in_checkpoints
from .engine import optimizer_of
from .metrics import figures_of

_KEY = "blockwise_lr_guard"


class EngineGuard(Guard):
    """What :func:`guard` returns."""

    def __init__(self, engine: Any, folder: str | None, load: Mapping[str, Any], **options: Any) -> None:
        self._find, self._folder, self._load = ref(engine), folder, load
        known = folder is not None
        super().__init__(
            optimizer_of(engine),
            roll_back=self._load_newest if known else None,
            save=self._save_now if known else None,
            **options,
        )
        self.steps_done = engine.global_steps
        keep_in_checkpoints(engine, GUARDED_CHECKPOINTS, _KEY, self.state_dict, self._loaded)

    @property
    def _engine(self) -> Any:
        return self._find()

    def step(self, loss: Any, figures: Mapping[str, float] | None = None) -> Alarm | None:
        """As :meth:`Guard.step`, after ``engine.step()``; the figures are those of the ds_config's block_metrics. In the steps
        in between those that end an accumulation it does nothing."""
        if self._engine.global_steps == self.steps_done:
            return None
        self.steps_done = self._engine.global_steps - 1
        return super().step(loss, figures_of(self._engine) if figures is None else figures)

    def _load_newest(self) -> int:
        assert self._folder is not None
        path, _ = load_newest(self._engine, self._folder, **self._load)
        if path is None:
            raise CheckpointError(
                f"guard: the loss asks to go back, and {self._folder} holds no complete checkpoint yet; save one before "
                f'{self.options.after} steps (the guard\'s option "after") are taken'
            )
        return self._engine.global_steps

    def _save_now(self) -> None:
        self._engine.save_checkpoint(self._folder)

    def _loaded(self, state: dict[str, Any] | None) -> None:
        if (
            state is not None and self._engine.global_steps == state["steps_done"]
        ):  # not where weights alone were loaded
            self.load_state_dict(state)
        self.steps_done = self._engine.global_steps


def guard(
    engine: Any, folder: str | os.PathLike | None = None, *, load: Mapping[str, Any] | None = None, **options: Any
) -> Guard:
    """Watches an engine's losses, and lowers its rates, goes back to a checkpoint, or ends the run, all saved with it.

    All ranks call it after ``deepspeed.initialize`` and before they load, and its ``step(loss)`` after each
    ``engine.step()``, with this rank's loss of the step. A loader that counts batches by the step reads the batch
    ``engine.global_steps + guard.skipped``.

    Args:
        engine: of ``deepspeed.initialize``, with a blockwise optimizer.
        folder: of the run's checkpoints: gone back to by the action ``roll_back``, and saved to before the run stops.
        load: further arguments of ``engine.load_checkpoint``.
        options: those of :class:`~blockwise_lr.measure.guard.GuardOptions`.

    Raises:
        BlockError: an engine without a blockwise optimizer or with a guard already, an unknown option or a bad value.
    """
    if GUARDED_CHECKPOINTS.applied_to(engine):
        raise BlockError("this engine has a guard already; use that one")
    return EngineGuard(engine, None if folder is None else os.fspath(folder), load or {}, **options)
