"""``"block_metrics": {"every": 100}`` in a ds_config: figures per block type in DeepSpeed's own monitors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from weakref import WeakKeyDictionary, proxy

from pydantic import Field

from ..blocks import BlockError
from ..blocks.types import shown
from ..collective.errors import run_on_all_ranks
from ..measure import BlockMonitor
from ..optim.base import BlockwiseOptimizer
from ..patches.deepspeed_instances import BLOCK_METRICS
from ..rules.options import CheckedOptions
from .after_step import after_each_step

KEY = "block_metrics"


class MetricsOptions(CheckedOptions):
    """The options of the key."""

    every: Annotated[int, Field(ge=1, description="optimizer steps between two reports")] = 100
    updates: Annotated[
        bool,
        Field(description="the size of updates too, which takes a copy of this rank's weights in the steps reported"),
    ] = True


class EngineMetrics:
    """What an engine reports.

    Attributes:
        latest: the figures of the last step; empty for one that was not reported.
    """

    def __init__(self, engine: Any, options: MetricsOptions) -> None:
        self.engine = proxy(engine)
        self.latest: dict[str, float] = {}
        self.monitor = BlockMonitor(
            engine.basic_optimizer,
            every=options.every,
            updates=options.updates,
            steps_done=lambda: self.engine.global_steps,
            sinks=[self._write],
            model=engine,
        )

    def after_step(self) -> None:
        """Reports, where it is time."""
        self.latest = self.monitor.report() or {}

    def _write(self, figures: Mapping[str, float], step: int) -> None:
        samples = self.engine.global_samples
        self.engine.monitor.write_events([(f"Train/Blocks/{name}", value, samples) for name, value in figures.items()])


_of_engines: WeakKeyDictionary[Any, EngineMetrics] = WeakKeyDictionary()


def options_of(engine: Any, given: Any) -> MetricsOptions | None:
    """The options that a ds_config's value of the key says; None where it has none.

    Raises:
        BlockError: a bad value, another optimizer, or no monitor that would show the figures.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise BlockError(f'{KEY} is {shown(given)}; write {{"every": 100}}')
    options = MetricsOptions.checked(given, f"{KEY}: ")
    if not isinstance(engine.basic_optimizer, BlockwiseOptimizer):
        raise BlockError(f"{KEY} needs a blockwise optimizer; remove it, or give one as the ds_config's optimizer")
    if not engine.monitor.enabled:
        raise BlockError(
            f'{KEY} goes to DeepSpeed\'s monitors, and the ds_config enables none; add one, as in "csv_monitor": '
            f'{{"enabled": true, "output_path": "logs"}}, or "tensorboard" or "wandb"'
        )
    return options


def start_metrics(engine: Any, options: MetricsOptions) -> None:
    """Has an engine report from its next step on.

    Raises:
        BlockError: as :class:`~blockwise_lr.measure.BlockMonitor`; on every rank.
    """
    made = run_on_all_ranks(lambda: EngineMetrics(engine, options), "starting block_metrics")
    _of_engines[engine] = made
    after_each_step(engine, BLOCK_METRICS, made.after_step)


def figures_of(engine: Any) -> dict[str, float]:
    """The figures of an engine's last step, by :func:`~blockwise_lr.measure.block_metrics`' names; empty for a step that was
    not reported, and for an engine whose ds_config has no block_metrics."""
    made = _of_engines.get(engine)
    return {} if made is None else made.latest
