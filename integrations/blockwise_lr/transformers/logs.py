"""Figures of ours in what a Trainer logs, beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def log_beside(trainer: Any, control: Any, figures: Mapping[str, float]) -> None:
    """Logs figures while a step ends, and leaves the Trainer's own log of that step due: a log of anything counts as that.

    Args:
        trainer, control: the Trainer, and the control that its callbacks are given.
    """
    due = control.should_log
    trainer.log(dict(figures))
    control.should_log = due
