"""What the Megatron door adds for Muon: its own options, and the flags of Megatron's own Muon that would have no effect."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..blocks import BlockError
from ..blocks.types import shown
from ..rules import UpdateRule
from ..rules.muon import MuonOptions

OPTIONS = ("momentum", "nesterov", "ns_steps", "matrix_scale")

# What Megatron's parser sets its own muon_* to where no flag does, which is not what its OptimizerConfig does. Process-wide, as
# its parsed arguments are.
_flag_defaults: dict[str, Any] = {}


def checked_options(given: Any) -> dict[str, Any]:
    """Muon's own options.

    Raises:
        BlockError: another option, or a value out of range.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BlockError(f"block_muon is {shown(given)}; give some of {', '.join(OPTIONS)} with their values")
    unknown = next((name for name in given if name not in OPTIONS), None)
    if unknown is not None:
        raise BlockError(f"block_muon has no {shown(unknown)}; give some of {', '.join(OPTIONS)}")
    options = MuonOptions.checked(given)
    return {name: getattr(options, name) for name in given}


def refuse_other_muons(rule: UpdateRule, given: Mapping[str, Any] | None, config: Any) -> None:
    """Refuses Muon's options for optimizers that are none, and those of Megatron's own Muon for ours.

    Args:
        given: block_muon.
        config: the OptimizerConfig.

    Raises:
        BlockError: either.
    """
    if not rule.whole_matrices:
        if given:
            raise BlockError(f"block_muon (--block-muon) is for blockwise_muon, and blockwise_{rule.name} is asked for")
        return
    for field in fields(config):
        value, usual = getattr(config, field.name), (field.default, _flag_defaults.get(field.name, field.default))
        if field.name.startswith("muon_") and field.default is not MISSING and value not in usual:
            raise BlockError(
                f"--{field.name.replace('_', '-')} is {value!r}, and blockwise_{rule.name} takes what it needs from "
                f"--block-muon ({', '.join(OPTIONS)}); leave it out"
            )


def note_defaults(parser: argparse.ArgumentParser) -> None:
    """Takes note of what Megatron's parser sets its own Muon's flags to."""
    _flag_defaults.clear()
    _flag_defaults.update(
        (action.dest, action.default) for action in parser._actions if action.dest.startswith("muon_")
    )
