"""Framework attributes on parameters and configs, read by functions that the adapters register.

This package imports no framework: without registered readers, shapes are those of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Marks:
    """Framework attributes of one parameter.

    Attributes:
        shape: the unpartitioned shape, if the tensor is a placeholder or a shard; None: the tensor's own.
        is_tied_copy: another pipeline stage holds the same embedding, and the framework keeps both equal.
        split_axis: the axis along which tensor-parallel ranks hold slices of it; None if it is not split.
    """

    shape: tuple[int, ...] | None = None
    is_tied_copy: bool = False
    split_axis: int | None = None


Reader = Callable[[torch.Tensor], Marks]
_readers: list[Reader] = []
_config_readers: list[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = []


def add_reader(reader: Reader) -> None:
    """Registers a reader of parameters; registering it twice has no effect."""
    if reader not in _readers:
        _readers.append(reader)


def add_config_reader(reader: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Registers a function from a config's values to further ones that the framework keeps elsewhere."""
    if reader not in _config_readers:
        _config_readers.append(reader)


def marks_of(parameter: torch.Tensor) -> Marks:
    """The marks that the registered readers find on a parameter; the first reader that finds one wins."""
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
    """Config values completed by the registered readers; values of the config itself take precedence."""
    added: dict[str, Any] = {}
    for reader in _config_readers:
        added.update(reader(values))
    return {**added, **values}
