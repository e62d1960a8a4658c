"""Models without code: named parameters on the meta device, for mapping from published names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]


class Skeleton(torch.nn.Module):
    """A module tree with meta parameters and a config, and no forward pass.

    Args:
        shapes: dotted parameter name -> shape, in the model's order.
        config: what the model's config states (numbers of heads, ``model_type``, ...).
        family: the naming table to use where the config has no ``model_type``; None: that of the config.
    """

    def __init__(self, shapes: Shapes, config: Mapping[str, Any], family: str | None = None) -> None:
        super().__init__()
        # nn.Module's own __setattr__ is typed for tensors and modules
        self.__dict__.update(config=dict(config), blockwise_family=family)
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                module = _child(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape, device="meta")))

    def tie(self, name: str, source: str) -> None:
        """Makes the parameter ``name`` the same tensor as the parameter ``source``."""
        path, _, leaf = name.rpartition(".")
        self.get_submodule(path).register_parameter(leaf, self.get_parameter(source))


def _child(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """The direct submodule of that name, added where there is none."""
    found = dict(module.named_children()).get(name)
    if found is None:
        found = torch.nn.Module()
        module.add_module(name, found)
    return found


def layers(count: int, prefix: str, layer: Shapes) -> Shapes:
    """The shapes of ``count`` equal layers, numbered from 0 after ``prefix``."""
    return {f"{prefix}.{number}.{name}": shape for number in range(count) for name, shape in layer.items()}
