"""The optimizers that the suite's matrices run over, and which of the combinations the default lane runs.

A row of KINDS adds an optimizer to all of them. It needs its plain single-process form in ``twins.REFERENCES``, under the
same name. README.md states the rule for ``full`` combinations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

import pytest

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, BlockwiseRAdam
from blockwise_lr.optim.base import BlockwiseOptimizer


@dataclass(frozen=True)
class Kind:
    """What the tests must know of an optimizer.

    Attributes:
        optimizer: the class.
        megatron: its name in Megatron's ``--optimizer``.
        sharded_error: how far (relative, 2-norm) sharded steps may come from the unsharded ones on equal gradients: 0.0 where
            every element is stepped by itself, more where a segment's squares are added in another order.
        plain_error: how far whole steps of the reference kernel may come from those of its form in ``twins``.
        jumps: a step is no continuous function of the gradient (a sign), so that models in which some gradient is nothing but
            rounding noise (BIASED: the biases of k) are left out where gradients are summed in another order.
        idle: first steps that leave the weights as they are.
        like: an optimizer that steps elements of the same plan and states, so that of each matrix the default lane runs the
            case with the most settings; "": none.
    """

    optimizer: type[BlockwiseOptimizer]
    megatron: str
    sharded_error: float
    plain_error: float
    jumps: bool = False
    idle: int = 0
    like: str = ""


KINDS: dict[str, Kind] = {
    "BlockwiseAdamW": Kind(BlockwiseAdamW, "blockwise_adamw", sharded_error=0.0, plain_error=0.0),
    "BlockwiseAdamMini": Kind(BlockwiseAdamMini, "blockwise_adam_mini", sharded_error=1e-6, plain_error=1e-6),
    "BlockwiseLion": Kind(BlockwiseLion, "blockwise_lion", sharded_error=0.0, plain_error=1e-6, jumps=True),
    "BlockwiseRAdam": Kind(
        BlockwiseRAdam, "blockwise_radam", sharded_error=0.0, plain_error=0.0, idle=5, like="BlockwiseAdamW"
    ),
}
BIASED = ("gpt2", "gpt_neox", "gpt")


def with_kinds(cases: Sequence[Sequence[Any]], kinds: Iterable[str] = KINDS) -> list[Any]:
    """Every case with every optimizer in front, for ``parametrize``.

    The default lane runs every case with some optimizer, and every optimizer with every value that a case has; the
    combinations beyond that are marked ``full``. They are chosen greedily, so that the cases with the most settings run
    with every optimizer.
    """
    combined = [
        (number, kind, case)
        for number, case in enumerate(cases)
        for kind in kinds
        if not (KINDS[kind].jumps and any(value in BIASED for value in case if isinstance(value, str)))
    ]
    covers = [
        {number, kind} if KINDS[kind].like else {number, kind, *((kind, value) for value in _values(case))}
        for number, kind, case in combined
    ]
    missing = set().union(*covers)
    default: set[int] = set()
    while missing:
        chosen = Counter(combined[number][1] for number in default)  # of equals, that of the optimizer with the fewest
        best = max(range(len(combined)), key=lambda n: (len(covers[n] & missing), -chosen[combined[n][1]]))
        default.add(best)
        missing -= covers[best]
    return [
        pytest.param(kind, *case, marks=() if number in default else pytest.mark.full)
        for number, (_, kind, case) in enumerate(combined)
    ]


def _values(case: Sequence[Any]) -> Iterable[str]:
    """The values of a case: its arguments; of a mapping its entries, of a dataclass the fields that differ from their
    defaults; "none" where these are none."""
    for position, value in enumerate(case):
        if is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in fields(value) if _is_set(field, value)}
        if isinstance(value, Mapping):
            yield from (f"{position}.{key}={entry}" for key, entry in value.items() or [("none", "")])
        else:
            yield f"{position}={value}"


def _is_set(field: Field, owner: Any) -> bool:
    default = field.default_factory() if field.default is MISSING else field.default
    return getattr(owner, field.name) != default


def options_of(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that an optimizer has, with the paper's ratios, which tell all block types apart as the default's
    do not, where none are among them."""
    if kind not in KINDS:
        return dict(options)
    known = KINDS[kind].optimizer.Options.model_fields
    return {"block_lr_ratios": "paper", **{name: value for name, value in options.items() if name in known}}
