"""Whole gradients of parameters, one after the other, also where FSDP2 or ZeRO-3 shards the parameters between uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..blocks import BlockError
from ..blocks.marks import marks_of

Take = Callable[[str, torch.Tensor], None]


class Gradients:
    """Gives each gradient of a backward pass away as soon as it is there, and keeps none: not even one whole model of them
    is ever held.

    ZeRO-3 gathers a parameter's own data for its module's forward and backward pass. FSDP2 puts gathered parameters in place of
    the sharded ones then, so these are found while the forward pass runs. Gradients come from ``torch.autograd.grad``: hooks
    that accumulate or reduce gradients, as the frameworks' own, do not run.

    Attributes:
        once: a forward pass serves one backward pass only.
    """

    def __init__(self, model: torch.nn.Module, names: set[str], take: Take) -> None:
        self.model, self._take = model, take
        every = list(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, p in every:
            first.setdefault(id(p), name)
        self._first = {name: first[id(p)] for name, p in every if first[id(p)] in names}  # of tied weights, one
        self._prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        # ZeRO-3 gathers a module's parameters for as many backward passes as it had forward passes
        self.once = any(marks_of(p).shape is not None for _, p in every)
        self._leaves: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the forward pass and the backward passes of one batch run."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        modules = {name.rpartition(".")[0] for name in self._first if isinstance(parameters[name], DTensor)}
        try:
            for name in self._first:
                if not isinstance(parameters[name], DTensor):
                    self._watch(name, parameters[name])
            for module, prefix in self._prefixes.items():
                if isinstance(module, FSDPModule) or prefix.removesuffix(".") in modules:
                    self._handles.append(module.register_forward_pre_hook(self._look))
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles, self._leaves = [], {}

    def _look(self, module: torch.nn.Module, inputs: Any) -> None:
        """Finds what FSDP2 has gathered for a module, or for all modules that it shards together."""
        for name, p in module.named_parameters(recurse=isinstance(module, FSDPModule)):
            whole = self._prefixes[module] + name
            if not isinstance(p, DTensor) and whole in self._first:
                self._watch(whole, p)

    def _watch(self, name: str, p: torch.Tensor) -> None:
        if id(p) in self._leaves or not p.requires_grad:
            return
        self._leaves[id(p)] = p
        known = self._first[name]

        def give(gradient: torch.Tensor) -> torch.Tensor:
            self._take(known, gradient)
            return gradient.new_zeros(()).expand_as(gradient)  # its memory is free now

        self._handles.append(p.register_hook(give))

    def backward(
        self, output: torch.Tensor, gradient: torch.Tensor, *, keep: bool, entered: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Gives every parameter's gradient away.

        Args:
            output: of the model.
            gradient: of the loss, with respect to the output.
            keep: whether another backward pass through the same graph follows.
            entered: what the model was given, where its gradient is wanted.

        Returns:
            The gradient with respect to ``entered``.

        Raises:
            BlockError: no parameter took part.
        """
        if not self._leaves:
            raise BlockError("the predictions use none of the model's trained parameters; give those of this model")
        wanted = [*([] if entered is None else [entered]), *self._leaves.values()]
        found = torch.autograd.grad(output, wanted, gradient, retain_graph=keep, allow_unused=True)
        return None if entered is None else found[0]
