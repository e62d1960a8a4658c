"""megatron.training: steps on shorter sequences, for a sequence length warmup, which Megatron has none of.

What reads ``args.seq_length`` in a step (the broadcast of a batch, the shapes that pipeline stages send) finds the step's
length there, and what comes between steps (evaluation, checkpoints, which would resume short for good) the full one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .symbols import Symbol
from .upstream_megatron import PACKAGE, VERSIONS


@dataclass(frozen=True)
class Hooks:
    """What a step trains on.

    Attributes:
        length: (Megatron's arguments, iterations done) -> the length of the next step; None where no
            warmup is asked for.
        cut: (a step's data iterators, its length) -> the same, whose batches are cut.
        done: (Megatron's arguments, iterations done, length): told after a step that was cut.
    """

    length: Callable[[Any, int], int | None]
    cut: Callable[[Any, int], Any]
    done: Callable[[Any, int, int], None]


def _install(undo: Undo, hooks: Hooks) -> None:
    from megatron.training import global_vars, training

    step, flops = training.train_step, training.num_floating_point_operations
    signature = inspect.signature(step)
    last: list[int | None] = [None]  # the length of the last step

    @functools.wraps(step)
    def train_step(*arguments: Any, **keywords: Any) -> Any:
        given, args = signature.bind(*arguments, **keywords), global_vars.get_args()
        done = args.curr_iteration
        length = last[0] = hooks.length(args, done)
        if length is None:
            return step(*arguments, **keywords)
        given.arguments["data_iterator"] = hooks.cut(given.arguments["data_iterator"], length)
        with _length_of(args, length):
            result = step(*given.args, **given.kwargs)
        hooks.done(args, done + 1, length)
        return result

    @functools.wraps(flops)
    def num_floating_point_operations(args: Any, *arguments: Any, **keywords: Any) -> Any:
        with _length_of(args, last[0] or args.seq_length):
            return flops(args, *arguments, **keywords)

    undo.set(training, "train_step", train_step)
    undo.set(training, "num_floating_point_operations", num_floating_point_operations)


class _length_of:
    """Megatron's arguments with another sequence length for a while."""

    def __init__(self, args: Any, length: int) -> None:
        self.args, self.length, self.full = args, length, args.seq_length

    def __enter__(self) -> None:
        self.args.seq_length = self.length

    def __exit__(self, *_: Any) -> None:
        self.args.seq_length = self.full


PATCH = Patch(
    name="megatron-sequence-length",
    package=PACKAGE,
    versions=VERSIONS,
    needs="megatron.training",
    symbols=(
        Symbol("megatron.training.training:train_step"),
        Symbol("megatron.training.training:num_floating_point_operations"),
    ),
    reads=(Symbol("megatron.training.global_vars:get_args"),),
    why="args.seq_length is one for the data, all steps, evaluation and checkpoints",
    until="Megatron has a sequence length warmup",
    install=_install,
    hooks=Hooks,
)
