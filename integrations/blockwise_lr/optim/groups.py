"""Param groups as torch.optim takes them: parameters, named parameters, or dicts of either with options of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def listed(entry: Any) -> Any:
    """A param group with its parameters as a list, where they come as a generator; anything else as it is."""
    inside = entry.get("params") if isinstance(entry, dict) else None
    if isinstance(inside, (torch.Tensor, list, set)) or inside is None:
        return entry
    return {**entry, "params": list(inside)}


def tensors_of(params: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors in what torch.optim takes for params."""
    for entry in params:
        inside = entry.get("params", ()) if isinstance(entry, dict) else (entry,)
        for item in (inside,) if isinstance(inside, torch.Tensor) else inside:
            tensor = item[1] if isinstance(item, tuple) and len(item) == 2 else item
            if isinstance(tensor, torch.Tensor):
                yield tensor


def names_of(group: Mapping[str, Any]) -> list[str | None]:
    """The names of a group's parameters, None where it has none."""
    return list(group.get("param_names") or [None] * len(group["params"]))


def settings_of(group: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A group's settings as they are built, which schedulers change later on, by the options' names."""
    found = {key: group[key] for key in names if key != "min_lr"}
    return {**found, "lr": float(group["lr"]), "min_lr": group["block_min_lr"]}
