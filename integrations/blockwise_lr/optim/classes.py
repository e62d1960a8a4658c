"""The optimizers' classes, one for each rule."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from ..rules import RULES, UpdateRule
from ..rules.options import OptimizerOptions
from .base import BlockwiseOptimizer
from .elementwise import ElementwiseOptimizer
from .matrixwise import MatrixSegmentOptimizer, MatrixwiseOptimizer
from .segmentwise import SegmentwiseOptimizer

_PARAMS = """params: ``model.named_parameters()``, or param groups of such pairs, as torch.optim takes them; tensors without
names where ``block_map`` comes from their model. A group may have options of its own: its ``lr`` is the base rate that ratios
multiply in it, its ``weight_decay`` holds for everything in it, and ratios that it does not name are the default's."""
_BLOCK_MAP = """block_map: from :func:`blockwise_lr.map_blocks`; needed where names do not tell the layout (fused, interleaved
or transposed QKV). Made from the names otherwise."""
_RAISES = """BlockError: a value out of range, an unknown block type, or a parameter that is not mapped."""


def optimizer_class(rule: UpdateRule) -> type[BlockwiseOptimizer]:
    """The class of a rule's optimizer, with the signature and the documentation that follow from its options."""
    of_elements, of_segments = (
        (MatrixwiseOptimizer, MatrixSegmentOptimizer)
        if rule.whole_matrices
        else (ElementwiseOptimizer, SegmentwiseOptimizer)
    )
    base: type[BlockwiseOptimizer] = of_elements if rule.segment_state is None else of_segments
    made: dict[str, Any] = {
        "rule": rule,
        "Options": rule.Options,
        "__module__": __package__,
        "__qualname__": rule.class_name,
        "__doc__": _documentation(rule),
        "__signature__": _signature(rule),
    }
    return type(rule.class_name, (base,), made)


def _signature(rule: UpdateRule) -> inspect.Signature:
    fields = _fields(rule)
    parameter, by_position, by_name = (
        inspect.Parameter,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return inspect.Signature(
        [
            parameter("params", by_position),
            *(parameter(name, by_position, default=fields[name].default) for name in rule.positional),
            parameter("block_map", by_name, default=None),
            *(
                parameter(name, by_name, default=field.default)
                for name, field in fields.items()
                if name not in rule.positional
            ),
        ]
    )


def _fields(rule: UpdateRule) -> dict[str, Any]:
    """The options that Python callers have; block_strict is for maps that a framework's integration makes."""
    return {name: field for name, field in rule.Options.model_fields.items() if name != "block_strict"}


def _documentation(rule: UpdateRule) -> str:
    fields = _fields(rule)
    names = [
        *rule.positional,
        *(name for name in rule.Options.names() if name in fields and name not in rule.positional),
    ]
    described = {name: f"{name}: {fields[name].description}." for name in names}
    first = list(rule.positional)
    lines = [
        _PARAMS,
        *(described[name] for name in first),
        _BLOCK_MAP,
        *(described[n] for n in names if n not in first),
    ]
    arguments = "\n".join(
        textwrap.indent(textwrap.fill(" ".join(line.split()), 112, subsequent_indent="    "), "    ") for line in lines
    )
    return f"{inspect.cleandoc(type(rule).__doc__ or rule.title)}\n\nArgs:\n{arguments}\n\nRaises:\n    {_RAISES}\n"


CLASSES: dict[str, type[BlockwiseOptimizer]] = {rule.class_name: optimizer_class(rule) for rule in RULES.values()}

__all__ = ["CLASSES", "OptimizerOptions", "optimizer_class"]
