"""Figures per block type in what a Trainer logs."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..blocks import BlockError
from ..measure import BlockMonitor
from ..optim.base import BlockwiseOptimizer
from .logs import log_beside


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
        inner = optimizer
        while inner is not None and not isinstance(inner, BlockwiseOptimizer):  # Accelerate's wrapper, and DeepSpeed's
            inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise BlockError(
                f"BlockMetricsCallback needs a blockwise optimizer, and the Trainer has {type(optimizer).__name__}; give "
                f"optimizer_cls_and_kwargs=(BlockwiseAdamWFactory, {{...}}), or the type in the ds_config"
            )
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
