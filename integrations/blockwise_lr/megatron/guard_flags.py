"""The flags of ``--guard``, and what they say."""

from __future__ import annotations

import argparse
from typing import Any

from ..blocks import BlockError
from ..measure.guard import ACTIONS, GuardOptions

_NAMES = [name for name in GuardOptions.model_fields if name != "action"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to Megatron's parser."""
    group = parser.add_argument_group(title="guard")
    group.add_argument(
        "--guard",
        choices=ACTIONS,
        help="Past a threshold: lower the rates for a while, end and go back to the newest checkpoint at the next start, or "
        "save and stop.",
    )
    for name in _NAMES:
        field = GuardOptions.model_fields[name]
        whole = field.annotation is int
        group.add_argument(
            f"--guard-{name.replace('_', '-')}",
            type=int if whole else float,
            metavar="N" if whole else "X",
            help=f"{str(field.description).replace('``', '')}; {field.default or 'none'} by default.",
        )


def are_given(arguments: Any) -> bool:
    """Whether any of the flags is; None is a library user's."""
    return any(getattr(arguments, name, None) is not None for name in ("guard", *(f"guard_{name}" for name in _NAMES)))


def checked_options(arguments: Any) -> dict[str, Any]:
    """The guard's options by the flags.

    Raises:
        BlockError: a bad value, or flags that have no effect.
    """
    given = {name: getattr(arguments, f"guard_{name}", None) for name in _NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    if not getattr(arguments, "guard", None):
        flag = f"--guard-{next(iter(given)).replace('_', '-')}"
        raise BlockError(
            f"{flag} has no effect without --guard; give --guard {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"
        )
    if "variance_ratio" in given and not arguments.block_metrics_interval:
        raise BlockError("--guard-variance-ratio judges what --block-metrics-interval reports; give that flag too")
    options = {"action": arguments.guard, **given}
    GuardOptions.checked(options, "--guard: ")
    return options


def check_way_back(arguments: Any) -> None:
    """Raises BlockError where a new start of the run could not go back."""
    if not hasattr(arguments, "iterations_to_skip"):
        raise BlockError(
            "--guard roll_back needs Megatron's --iterations-to-skip, which this version lacks; use --guard lower"
        )
    if not arguments.save or arguments.load != arguments.save:
        raise BlockError(
            "--guard roll_back goes back by a new start of the run; give --save and --load with one folder"
        )
