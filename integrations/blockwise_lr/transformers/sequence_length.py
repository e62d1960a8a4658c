"""Sequence length warmup for the Trainer without DeepSpeed; with it, the ds_config says it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from ..blocks import BlockError
from ..patches import transformers_batches
from ..sequence_length import SequenceLengthWarmup, WarmupOptions
from ..sequence_length.warmup import cut_of_trainer


class SequenceLengthCallback(TrainerCallback):
    """``Trainer(callbacks=[SequenceLengthCallback(start=64, end=1024, steps=45000)])``.

    The length follows the Trainer's ``global_step``, which its checkpoints hold. Evaluation is at full length.

    Args:
        options: those of :class:`~blockwise_lr.sequence_length.WarmupOptions`.

    Raises:
        BlockError: an unknown option or a bad value; when training starts, a Trainer with DeepSpeed.
    """

    def __init__(self, **options: Any) -> None:
        WarmupOptions.checked(options, "sequence_length_warmup: ")
        self.options = options
        self.warmup: SequenceLengthWarmup | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module | None = None, **_: Any
    ) -> None:
        """Cuts what the model is called with from now on."""
        if getattr(args, "deepspeed", None):
            raise BlockError(
                'with DeepSpeed write "sequence_length_warmup" into the ds_config, import blockwise_lr.deepspeed, and leave '
                "out SequenceLengthCallback"
            )
        assert model is not None  # the Trainer's own
        self._detach()
        transformers_batches.PATCH.apply(transformers_batches.Hooks(cut_of_trainer))
        self.warmup = SequenceLengthWarmup(model, **self.options)
        self.warmup.steps_done = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The next step's length."""
        if self.warmup is not None:
            self.warmup.steps_done = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leaves the model as it was."""
        self._detach()

    def _detach(self) -> None:
        if self.warmup is not None:
            self.warmup.detach()
            self.warmup = None
