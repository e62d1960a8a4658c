"""Figures per block type in what a Trainer logs."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..measure import BlockMonitor
from .logs import log_beside
from .wrapped import blockwise_optimizer


class BlockMetricsCallback(TrainerCallback):
    """``trainer.add_callback(BlockMetricsCallback(trainer, every=100))``: the figures of a
    :class:`~blockwise_lr.measure.BlockMonitor`, logged by ``trainer.log`` wherever the Trainer reports to.

    Args:
        trainer: whose log they go to.
        every: optimizer steps between two reports.
        updates: as for BlockMonitor.

    Raises:
        BlockError: when training starts, the Trainer's optimizer is no blockwise one.
    """

    def __init__(self, trainer: Any, every: int = 100, updates: bool = True) -> None:
        self.trainer, self.every, self.updates = trainer, every, updates
        self.monitor: BlockMonitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Watches the optimizer from now on."""
        self._close()
        inner = blockwise_optimizer(optimizer, "BlockMetricsCallback")
        self.monitor = BlockMonitor(
            inner,
            every=self.every,
            updates=self.updates,
            steps_done=lambda: self.trainer.state.global_step,
            model=self.trainer.model_wrapped,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports, where it is time."""
        figures = None if self.monitor is None else self.monitor.report()
        if figures:
            log_beside(self.trainer, control, {f"blocks/{name}": value for name, value in figures.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watches no more."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
