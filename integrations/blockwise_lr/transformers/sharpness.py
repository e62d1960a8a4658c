"""The sharpness of every block type while the Trainer trains, in its logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from ..measure.every import SharpnessEvery, sharpness_figures
from ..measure.parts import Predictions, causal_lm
from .logs import log_beside


class SharpnessCallback(TrainerCallback):
    """``trainer.add_callback(SharpnessCallback(trainer, held_out_batches, every=1000))``.

    The figures go where the Trainer's own go: its log history and what ``report_to`` names. Training goes on as it would
    without, to the bit, and costs what :class:`~blockwise_lr.measure.SharpnessEvery` says. With DeepSpeed as well.

    Args:
        trainer: whose log the figures go to.
        batches, every, draws, seed, predictions: as for :class:`~blockwise_lr.measure.SharpnessEvery`. Batches have to be on
            the model's device.

    Raises:
        BlockError: ``every`` is below 1; while training, as :func:`~blockwise_lr.measure.measure_sharpness`.
    """

    def __init__(
        self,
        trainer: Any,
        batches: Callable[[], Iterable[Any]] | Iterable[Any],
        every: int,
        *,
        draws: int = 8,
        seed: int = 0,
        predictions: Predictions = causal_lm,
    ) -> None:
        self.trainer = trainer
        self.measure = SharpnessEvery(
            torch.nn.Module(), batches, every, draws=draws, seed=seed, predictions=predictions
        )

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module | None = None, **_: Any) -> None:
        """Measures where it is due."""
        assert model is not None  # the Trainer's own
        self.measure.model = model
        found = self.measure(state.global_step)
        if found is not None:
            log_beside(self.trainer, control, sharpness_figures(found))
