"""The length of the sequences at each step: short first, then step by step longer (arXiv 2108.06084).

A pure function of the number of the step, so that every rank and every resumed run comes to the same length without asking.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ..blocks.types import BlockError, shown
from ..rules.options import CheckedOptions, one_of

PACINGS = ("linear", "root", "discrete")
WAYS = ("truncate", "reshape")


def _count(least: int, what: str) -> BeforeValidator:
    def check(value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"give a whole number of {what}, {least} or above")
        return value

    return BeforeValidator(check)


def _pacing(value: Any) -> Any:
    if not callable(value) and (not isinstance(value, str) or value not in PACINGS):
        raise ValueError(
            f"use one of {', '.join(PACINGS)}, or in Python a function of the step that returns the length"
        )
    return value


def _rising(value: Any) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (None,)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError("give a list of whole numbers, 1 or above")
    if any(first >= second for first, second in pairwise(numbers)):
        raise ValueError("give rising numbers: sequences never become shorter again")
    return numbers


def _dims(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str)
        and isinstance(dims, (list, tuple))
        and all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims)
        for name, dims in value.items()
    ):
        raise ValueError('give the dimensions of the sequence by name, as in {"relative_bias": [2, 3], "pixels": []}')
    return {name: tuple(dims) for name, dims in value.items()}


class WarmupOptions(CheckedOptions):
    """The options of a sequence length warmup; the same in a ds_config and in Python."""

    start: Annotated[
        int | None, _count(1, "tokens"), Field(description="the first length, rounded up to a multiple")
    ] = None
    end: Annotated[
        int | None, _count(1, "tokens"), Field(description="the full length, that of your data; from ``steps`` on")
    ] = None
    steps: Annotated[
        int | None, _count(1, "optimizer steps"), Field(description="optimizer steps until ``end`` is reached")
    ] = None
    pacing: Annotated[
        Any,
        BeforeValidator(_pacing),
        Field(description="``linear``, ``root``, ``discrete``, or in Python a function of the step, from 1"),
    ] = "linear"
    root_degree: Annotated[
        int,
        _count(1, "steps of the root"),
        Field(description="of ``root``: start + (end - start) (t / steps)^(1/degree)"),
    ] = 2
    lengths: Annotated[
        tuple[int, ...],
        BeforeValidator(_rising),
        Field(description="of ``discrete``: the lengths, the last the full one"),
    ] = ()
    until: Annotated[
        tuple[int, ...],
        BeforeValidator(_rising),
        Field(description="of ``discrete``: the last step of each length but the last"),
    ] = ()
    multiple: Annotated[
        int, _count(1, "tokens"), Field(description="lengths are multiples of it, but for the full one")
    ] = 8
    way: Annotated[
        str,
        one_of(*WAYS),
        Field(
            description="``truncate`` throws the cut tokens away, as the paper; ``reshape`` makes further rows of them"
        ),
    ] = "truncate"
    dims: Annotated[
        dict[str, tuple[int, ...]],
        BeforeValidator(_dims),
        Field(description="which dimensions of a model's further arguments are the sequence's; [] leaves one whole"),
    ] = {}

    @model_validator(mode="after")
    def _complete(self) -> WarmupOptions:
        if self.pacing == "discrete":
            if len(self.lengths) < 2 or len(self.until) != len(self.lengths) - 1:
                raise BlockError(
                    f"pacing discrete has {len(self.lengths)} lengths and {len(self.until)} steps in until; give two or more "
                    f"lengths, and in until the last step of each but the last"
                )
            if (self.start, self.end, self.steps) != (None, None, None):
                raise BlockError("pacing discrete says its lengths one by one; leave out start, end and steps")
            return self
        if self.lengths or self.until:
            raise BlockError(f"lengths and until belong to pacing discrete, and pacing is {shown(self.pacing)}")
        missing = [name for name in ("start", "end", "steps") if getattr(self, name) is None]
        if missing:
            raise BlockError(f'{missing[0]} is not given; write "start", "end" and "steps"')
        if self.start >= self.end:  # type: ignore[operator]  # both are numbers now
            raise BlockError(f"start is {self.start} and end is {self.end}; start below the full length")
        return self


class LengthSchedule:
    """The sequence length of every step.

    With start s, end e, T steps, multiple k and degree d, step t (from 1) has
    x = floor((t / T)^(1/d) (e - s) + s), rounded down to a multiple of k, at least s rounded up to one, and e from step T
    on; linear pacing is d = 1. Source: DeepSpeed's CurriculumScheduler, which this equals step by step but for step T where
    e is no multiple of k: there it still rounds down.

    Args:
        options: checked.
        needed: what the layout needs lengths to be multiples of, besides ``multiple``.

    Raises:
        BlockError: no length is left between start and end, or a custom pacing returns what is no length, or less than
            before.
    """

    def __init__(self, options: WarmupOptions, needed: int = 1) -> None:
        self.options = options
        self.multiple = math.lcm(options.multiple, needed)
        discrete = options.pacing == "discrete"
        self.full: int = options.lengths[-1] if discrete else options.end  # type: ignore[assignment]
        self.first = math.ceil((options.lengths[0] if discrete else options.start) / self.multiple) * self.multiple  # type: ignore[operator]
        if self.first >= self.full:
            raise BlockError(
                f"the first length, rounded up to a multiple of {self.multiple}, is {self.first} and the full one "
                f"{self.full}; start lower, or with a smaller multiple"
            )
        self._table: tuple[list[int], list[int]] | None = None
        if not isinstance(options.pacing, str):
            self._table = _changes(self._asked(options.pacing), options.steps or 1, self.full)

    def length(self, step: int) -> int:
        """Tokens per sequence at a step, counted from 1; a step below 1 has the first length."""
        options = self.options
        if self._table is not None:
            starts, lengths = self._table
            return lengths[bisect_right(starts, max(step, 1)) - 1]
        if options.pacing == "discrete":
            number = next((i for i, last in enumerate(options.until) if step <= last), len(options.until))
            return self.full if number == len(options.until) else self._rounded(options.lengths[number])
        low, high, steps = options.start, options.end, options.steps
        if step >= steps:  # type: ignore[operator]
            return self.full
        degree = 1 if options.pacing == "linear" else options.root_degree
        part = (max(step, 1) / steps) ** (1.0 / degree)  # type: ignore[operator]
        return self._rounded(math.floor(part * (high - low) + low))  # type: ignore[operator]

    def _rounded(self, length: int) -> int:
        return min(max(length - length % self.multiple, self.first), self.full)

    def _asked(self, pacing: Callable[[int], int]) -> Callable[[int], int]:
        def ask(step: int) -> int:
            length = pacing(step)
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise BlockError(f"pacing returned {shown(length)} at step {step}; return a whole number of tokens")
            return self._rounded(length)

        return ask

    @cached_property
    def changes(self) -> list[tuple[int, int]]:
        """(first step, length) of every distinct length, in order. Each is a shape, for which kernels may be compiled."""
        if self._table is not None:
            return list(zip(*self._table))
        last = self.options.until[-1] + 1 if self.options.pacing == "discrete" else self.options.steps or 0
        found = [(1, self.length(1))]
        while found[-1][1] < self.full:
            step, length = found[-1]
            low, high = step, last  # length(low) is still the last one found, length(high) is longer
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.length(middle) == length else (low, middle)
            found.append((high, self.length(high)))
        return found

    def tokens(self, steps: int, sequences: int) -> int:
        """Tokens that are trained on in the first steps, with so many sequences a step (truncated, not reshaped)."""
        ends = [step - 1 for step, _ in self.changes[1:]] + [max(steps, self.changes[-1][0])]
        firsts = [step for step, _ in self.changes]
        spans = (max(0, min(end, steps) - first + 1) for first, end in zip(firsts, ends))
        return sequences * sum(span * length for span, (_, length) in zip(spans, self.changes))

    def steps_for(self, tokens: int, sequences: int) -> int:
        """The steps after which at least so many tokens are trained on."""
        done, left = 0, -(-tokens // sequences)
        for (first, length), (following, _) in pairwise(self.changes):
            needed = -(-left // length)
            if needed <= following - first:
                return done + needed
            done, left = following - 1, left - length * (following - first)
        return done + max(0, -(-left // self.full))

    def describe(self) -> str:
        """One line for a log."""
        first, at = self.changes[0][1], self.changes[-1][0]
        return (
            f"sequence length warmup: {first} to {self.full} tokens over {at} steps, in multiples of {self.multiple}; "
            f"{len(self.changes)} distinct lengths, each a shape to compile or tune for"
        )


def _changes(pacing: Callable[[int], int], steps: int, full: int) -> tuple[list[int], list[int]]:
    """The steps at which a custom pacing changes, and the lengths from there on; the full one from ``steps`` on.

    Raises:
        BlockError: it returns a shorter length than before.
    """
    starts: list[int] = []
    lengths: list[int] = []
    for step in range(1, steps + 1):
        length = full if step == steps else pacing(step)
        if lengths and length < lengths[-1]:
            raise BlockError(
                f"pacing returned {length} at step {step} after {lengths[-1]}; sequences never become shorter again"
            )
        if not lengths or length > lengths[-1]:
            starts.append(step)
            lengths.append(length)
    return starts, lengths


def layout_multiple(
    *, context_parallel: int = 1, tensor_parallel: int = 1, sequence_parallel: bool = False, fp8: str | None = None
) -> tuple[int, str]:
    """What lengths must be multiples of under a layout, and why, in words.

    Context parallelism cuts a sequence into 2 x CP pieces, sequence parallelism each of these over the TP ranks, and FP8
    kernels take multiples of 16 tokens a rank (MXFP8 of 32).

    Args:
        context_parallel, tensor_parallel: ranks.
        sequence_parallel: Megatron's, over the tensor-parallel ranks.
        fp8: None, "fp8" or "mxfp8".
    """
    needs = []
    ranks = context_parallel * (tensor_parallel if sequence_parallel else 1)
    if context_parallel > 1:
        needs.append((2 * ranks, f"2 x {ranks} ranks that share a sequence"))
    elif ranks > 1:
        needs.append((ranks, f"{ranks} ranks that share a sequence"))
    if fp8 is not None:
        part = 32 if fp8 == "mxfp8" else 16
        needs.append((part * ranks, f"{part} tokens a rank for {fp8}"))
    return math.lcm(*(number for number, _ in needs)), " and ".join(f"{number} ({why})" for number, why in needs)
