"""A data-flow probe of attention: which rows of which parameters feed the scores, and which feed the values.

Runs the model's own forward pass, watches softmax and scaled_dot_product_attention, and asks autograd which rows have a
gradient from the scores and which from the values. On real tensors the answer is per row; on the meta device, where
nothing is computed, it is per parameter. No name is looked at.

Reads only what torch functions show: attention inside a custom kernel, or torch.nn.MultiheadAttention, is not seen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .blocks import BlockError, BlockMap, BlockType, ParamLayout
from .blocks.layout import MATRIX

_MIX = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")


@dataclass(frozen=True)
class Use:
    """What one parameter feeds in the attention of its module.

    Attributes:
        scores, values: one flag per output unit of the parameter (a single one on the meta device): whether it feeds the
            scores, and the values.
    """

    scores: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Contradiction:
    """Output units whose block type in the map is not what they feed.

    Attributes:
        parameter: its name.
        where: the units, e.g. "rows 0–63".
        block: what the map calls them.
        feeds: "values" or "scores".
    """

    parameter: str
    where: str
    block: BlockType
    feeds: str


@dataclass
class _Sighting:
    module: str
    scores: list[torch.Tensor]
    values: list[torch.Tensor]


@dataclass
class _Watch:
    """The modules that are running, and the attention seen in them."""

    stack: list[tuple[str, nn.Module]] = field(default_factory=list)
    seen: list[_Sighting] = field(default_factory=list)

    def record(self, scores: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        name = next((name for name, module in reversed(self.stack) if any(True for _ in module.parameters())), "")
        self.seen.append(_Sighting(name, _grown(scores), _grown(values)))


def _grown(tensors: list[Any]) -> list[torch.Tensor]:
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


class _Functions(TorchFunctionMode):
    """Sees attention written out (softmax, then a product with the values) and fused."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch
        self.weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # attention weights -> the scores that they are of

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            q, k, v = args[:3] if len(args) > 2 else (kwargs["query"], kwargs["key"], kwargs["value"])
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.watch.record([q, k, mask], [v])
        elif name in ("softmax", "_softmax", "_safe_softmax"):
            self._mark(result, args[0] if args else kwargs["input"])
        else:
            self._follow(name, args, result)
        return result

    def _mark(self, result: Any, scores: Any) -> None:
        if isinstance(result, torch.Tensor) and isinstance(scores, torch.Tensor) and scores.dim() > 2:
            self.weights[result] = scores

    def _follow(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        operands = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        operands = [a for a in operands if isinstance(a, torch.Tensor)]
        weights = next((a for a in operands if a in self.weights), None)
        if weights is None:
            return
        if name in _MIX:
            self.watch.record([self.weights[weights]], [a for a in operands if a is not weights])
        elif isinstance(result, torch.Tensor) and 0 < result.numel() <= weights.numel():
            self.weights[result] = self.weights[weights]  # dropout, a cast, another shape, without the sink


@contextlib.contextmanager
def _watched(model: nn.Module, cut: set[str]) -> Iterator[_Watch]:
    """Hooks that follow the running modules; those named in ``cut`` get their inputs without history."""
    watch, handles = _Watch(), []

    def enter(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            watch.stack.append((name, module))
            return (_detached(args), _detached(kwargs)) if name in cut else None

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        watch.stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with _Functions(watch), torch.enable_grad():
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_detached(v) for v in value)
    if type(value) is dict:
        return {key: _detached(v) for key, v in value.items()}
    return value


def probe(model: nn.Module, run: Callable[[], Any]) -> dict[str, Use]:
    """What the parameters of the attention modules feed.

    Args:
        model: on the CPU, a GPU, or the meta device; its parameters must require gradients.
        run: calls the model once. If it fails half way (a mixture of experts on the meta device), what ran before counts.

    Returns:
        Parameter name -> what it feeds, for all parameters of the modules in which attention was seen.

    Raises:
        BlockError: no attention was seen, with the error of the forward pass if it ended in one.
    """
    failure: Exception | None = None
    seen: list[_Sighting] = []
    cut: set[str] = set()
    for _ in range(2):  # the second time, what earlier layers computed is cut off
        with _watched(model, cut) as watch:
            try:
                run()
            except Exception as error:  # any model's, reported below if nothing was seen
                failure = error
        seen, cut = watch.seen, {sighting.module for sighting in watch.seen}
    if not seen:
        raise BlockError(f"no attention was seen in the forward pass{f', which failed: {failure}' if failure else ''}")
    uses: dict[str, Use] = {}
    for sighting in seen:
        found = _uses(model, sighting)
        # without parameters for both it is no attention but weights of a mixture: of experts, or of residual streams
        if any(use.scores.any() for use in found.values()) and any(use.values.any() for use in found.values()):
            for name, use in found.items():
                before = uses.get(name, use)
                uses[name] = Use(before.scores | use.scores, before.values | use.values)
    return uses


def _uses(model: nn.Module, sighting: _Sighting) -> dict[str, Use]:
    prefix = f"{sighting.module}." if sighting.module else ""
    named = [(n, p) for n, p in model.get_submodule(sighting.module).named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    flags = zip(_fed(parameters, sighting.scores), _fed(parameters, sighting.values))
    return {prefix + name: Use(*of) for (name, _), of in zip(named, flags)}


def _fed(parameters: Sequence[torch.Tensor], outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The elements of each parameter that any of these tensors depends on, as flags of its shape; one flag on meta."""
    if any(p.is_meta for p in parameters):
        reached = set().union(*(_leaves(t.grad_fn) for t in outputs))
        return [torch.tensor([id(p) in reached]) for p in parameters]
    fed = [torch.zeros(p.shape, dtype=torch.bool) for p in parameters]
    for tensor in outputs:
        if tensor.grad_fn is not None and parameters:
            weights = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            found = torch.autograd.grad(tensor, parameters, weights, retain_graph=True, allow_unused=True)
            for flags, gradient in zip(fed, found):
                if gradient is not None:
                    flags |= ((gradient != 0) & gradient.isfinite()).cpu()  # NaN, of an overflow, tells nothing
    return fed


def _leaves(node: Any) -> set[int]:
    """The ids of the tensors that an autograd graph starts from."""
    found, leaves, queue = {node}, set(), [node]
    while queue:
        node = queue.pop()
        if node is None:
            continue
        leaves.add(id(getattr(node, "variable", None)))
        following = {inner for inner, _ in node.next_functions} - found
        found |= following
        queue += following
    return leaves


def contradictions(block_map: BlockMap, uses: dict[str, Use]) -> list[Contradiction]:
    """Where map and probe disagree: qk that feeds values, vo that feeds scores alone, or another block type's matrix with
    units that feed one of them alone. What feeds both (a latent that k and v share) is vo by the product's rule."""
    found = []
    for name, use in uses.items():
        layout = block_map.get(name)
        if layout is None or layout.kind != MATRIX or (use.scores.numel() == 1 < len(layout.blocks)):
            continue  # of a fused weight the meta device tells nothing
        for start, end, piece in layout.spans():
            scores, values = (_units(layout, flags, start, end) for flags in (use.scores, use.values))
            wrong = ""
            if piece.block is BlockType.QK and values:
                wrong = "values"
            elif piece.block is BlockType.VO and scores and not values:
                wrong = "scores"
            elif piece.block not in (BlockType.QK, BlockType.VO, BlockType.NORM):
                wrong = _alone(layout, use, start, end)
            if wrong:
                axis = "columns" if layout.transposed else "rows"
                found.append(Contradiction(name, f"{axis} {start}–{end - 1}", piece.block, wrong))
    return found


def _alone(layout: ParamLayout, use: Use, start: int, end: int) -> str:
    """What some of these output units feed alone: "scores", "values", both where some feed one and some the other, or
    nothing."""
    scores, values = (_of_units(layout, flags, start, end) for flags in (use.scores, use.values))
    found = [name for name, alone in (("scores", scores & ~values), ("values", values & ~scores)) if bool(alone.any())]
    return " and the ".join(found)


def _units(layout: ParamLayout, flags: torch.Tensor, start: int, end: int) -> bool:
    """Whether any of these output units is flagged."""
    return bool(_of_units(layout, flags, start, end).any())


def _of_units(layout: ParamLayout, flags: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Whether each of these output units is flagged; on the meta device one answer for all."""
    if flags.numel() == 1:
        return flags.reshape(1)
    batch = math.prod(layout.shape[: layout.batch_dims])
    flags = flags.reshape(batch, *layout.shape[layout.batch_dims :])
    axis = flags.dim() - 1 if layout.transposed else 1
    return flags.narrow(axis, start, end - start).movedim(axis, 0).flatten(1).any(1)
