"""What frameworks have marked on parameters and configs, as readers handed in by their adapters tell it.

This package itself knows no framework: without readers a parameter is what torch says it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Marks:
    """What is marked on one parameter.

    Attributes:
        shape: of the whole parameter, where the tensor at hand is a placeholder or a part; None: the tensor's own.
        is_tied_copy: another pipeline stage holds the same embedding, and both are kept equal.
        split_axis: the axis along which tensor-parallel ranks hold slices of it; None where they do not.
    """

    shape: tuple[int, ...] | None = None
    is_tied_copy: bool = False
    split_axis: int | None = None


Reader = Callable[[torch.Tensor], Marks]
_readers: list[Reader] = []
_config_readers: list[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = []


def add_reader(reader: Reader) -> None:
    """Hands in a reader of parameters' marks; a second time changes nothing."""
    if reader not in _readers:
        _readers.append(reader)


def add_config_reader(reader: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Hands in what completes the values of a model's config by those the framework keeps elsewhere."""
    if reader not in _config_readers:
        _config_readers.append(reader)


def marks_of(parameter: torch.Tensor) -> Marks:
    """All that the readers find on a parameter."""
    found = Marks()
    for reader in _readers:
        marks = reader(parameter)
        found = replace(
            found,
            shape=found.shape or marks.shape,
            is_tied_copy=found.is_tied_copy or marks.is_tied_copy,
            split_axis=marks.split_axis if found.split_axis is None else found.split_axis,
        )
    return found


def completed_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Config values with those that the readers know; what the config says itself stays."""
    added: dict[str, Any] = {}
    for reader in _config_readers:
        added.update(reader(values))
    return {**added, **values}
