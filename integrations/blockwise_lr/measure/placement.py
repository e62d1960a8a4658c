"""Where a Transformer has its norms, read off one forward pass: pre-LN, post-LN, sandwich, reordered, DeepNorm or none.

Names cannot tell: ``post_attention_layernorm`` is the feed-forward network's input norm in LLaMA and the attention's output
norm in Gemma 2. So hooks record what goes into and comes out of every norm, attention and feed-forward network, and least
squares finds what is added to what. Sources: arXiv 2002.04745 (pre-LN and post-LN), 2502.02732 (sandwich), 2203.00555
(DeepNorm).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks import BlockError, BlockMap, BlockType

PRE, POST, SANDWICH, REORDERED, DEEPNORM, NONE, UNKNOWN = (
    "pre-LN",
    "post-LN",
    "sandwich",
    "reordered",
    "DeepNorm",
    "none",
    "unknown",
)
_LAYER = re.compile(r"^(.*?\.\d+)\.(\w+(?:\.\d+)?)")
_ATTENTION, _FFN = "attention", "ffn"
_FITS = 1e-3  # of the norm of what is explained


@dataclass(frozen=True)
class Sublayer:
    """An attention or a feed-forward network of one layer.

    Attributes:
        layer: name of the layer.
        kind: "attention" or "ffn".
        placement: one of the module's names.
        residual: factor of what its output is added to, over that of the output.
        qk_norm: a norm lies between q, k and v and the attention's output.
        output: the module that makes its output.
    """

    layer: str
    kind: str
    placement: str
    residual: float
    qk_norm: bool
    output: str


@dataclass
class _Event:
    """A leaf of attention or feed-forward network, or a norm, as it ran."""

    name: str
    module: torch.nn.Module
    role: str
    before: torch.Tensor
    after: torch.Tensor


def placements(model: torch.nn.Module, block_map: BlockMap, ids: torch.Tensor) -> list[Sublayer]:
    """The placement of the norms of every sublayer, in the order in which they run.

    Args:
        model: with random weights, in evaluation mode.
        block_map: its map; which modules are attention, feed-forward network and norm is read from it.
        ids: token ids (batch, length), which the model is called with once.

    Raises:
        BlockError: no layer with an attention or a feed-forward network was seen.
    """
    events, outputs = _recorded(model, block_map, ids)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for number, event in enumerate(events):
        found = _LAYER.match(event.name)
        if found and event.role != "norm":
            part = found[2] if event.role == _ATTENTION else ""
            groups.setdefault((found[1], event.role, part), []).append(number)
    if not groups:
        raise BlockError("no layer with an attention or a feed-forward network ran; give a Transformer")
    sublayers = []
    for (layer, kind, _), numbers in groups.items():
        first, last = events[numbers[0]], events[numbers[-1]]
        others = [events[of[-1]].after for key, of in groups.items() if key[0] == layer and of != numbers]
        placement, residual = _placed(layer, first.before, last, events, outputs, others)
        inside = [event for event in events[numbers[0] : numbers[-1]] if event.role == "norm"]
        sublayers.append(Sublayer(layer, kind, placement, residual, kind == _ATTENTION and bool(inside), last.name))
    return sublayers


def _recorded(
    model: torch.nn.Module, block_map: BlockMap, ids: torch.Tensor
) -> tuple[list[_Event], list[torch.Tensor]]:
    """What norms and leaves took and gave, in order, and what layers gave."""
    events: list[_Event] = []
    outputs: list[torch.Tensor] = []
    hooks = []

    def watch(name: str, module: torch.nn.Module, role: str) -> None:
        def seen(_: Any, arguments: tuple, given: dict[str, Any], result: Any) -> None:
            before = next((value for value in (*arguments, *given.values()) if isinstance(value, torch.Tensor)), None)
            after = result[0] if isinstance(result, tuple) else result
            if before is not None and isinstance(after, torch.Tensor):
                events.append(_Event(name, module, role, before.detach().float(), after.detach().float()))

        hooks.append(module.register_forward_hook(seen, with_kwargs=True))

    for name, module in model.named_modules():
        role = _role(name, module, block_map)
        if role is not None:
            watch(name, module, role)
        elif re.fullmatch(r".*\.\d+", name):

            def gave(_: Any, arguments: tuple, result: Any) -> None:
                first = result[0] if isinstance(result, tuple) else result
                if isinstance(first, torch.Tensor):
                    outputs.append(first.detach().float())

            hooks.append(module.register_forward_hook(gave))
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return events, outputs


def _role(name: str, module: torch.nn.Module, block_map: BlockMap) -> str | None:
    if "norm" in type(module).__name__.lower():
        return "norm"
    blocks = {
        block
        for own, _ in module.named_parameters(recurse=False)
        for block in (block_map[f"{name}.{own}"].blocks if f"{name}.{own}" in block_map else ())
    }
    if not blocks:
        return None
    if blocks == {BlockType.NORM}:
        return "norm"
    if blocks <= {BlockType.QK, BlockType.VO}:
        return _ATTENTION
    return _FFN if blocks == {BlockType.FFN} else None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


def _placed(
    layer: str,
    entered: torch.Tensor,
    last: _Event,
    events: Sequence[_Event],
    outputs: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
) -> tuple[str, float]:
    """The placement of one sublayer, and the factor of its residual.

    Args:
        layer: name of its layer, in which a norm behind an addition must lie; the model's last norm is none.
        entered: what its first linear layers were given.
        last: its last one.
        events, outputs: all that was recorded.
        others: outputs of the layer's other sublayers, for those that run side by side.
    """
    norms = [event for event in events if event.role == "norm"]
    before = next((norm for norm in norms if _same(norm.after, entered)), None)
    behind = next((norm for norm in norms if _same(norm.before, last.after)), None)
    branch = last.after if behind is None else behind.after
    into_norms = [norm.before for norm in norms if norm is not behind and norm.name.startswith(f"{layer}.")]
    # of what else the residual may be, and of what more may be added, that which explains the sum best
    best: tuple[float, str, float] = (_FITS, UNKNOWN, 1.0)
    for total in [*into_norms, *outputs, *(event.before for event in events if event.role != "norm")]:
        for name, residual in (("raw", entered), ("before norm", None if before is None else before.before)):
            if residual is None or residual.numel() != total.numel() or branch.numel() != total.numel():
                continue
            normed = any(total is one for one in into_norms)
            for more in ([], *([other] for other in others if other.numel() == total.numel())):
                error, factors = _fit(total, [residual, branch, *more])
                if error < best[0] and min(factors) > 1e-3:
                    best = (error, f"{name}{' normed' if normed else ''}", factors[0] / factors[1])
    _, how, factor = best
    if how == UNKNOWN:
        return UNKNOWN, 1.0
    if how.startswith("before norm"):
        return (PRE if behind is None else SANDWICH), factor
    if behind is not None:
        return REORDERED, factor
    if how.endswith("normed"):
        return (DEEPNORM if factor > 1.05 else POST), factor
    return NONE, factor


def _fit(total: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[float, list[float]]:
    """How much of a tensor a sum of parts leaves unexplained (relative, 2-norm), and their factors."""
    wanted = total.reshape(-1, 1).double()
    columns = torch.stack([part.reshape(-1) for part in parts], 1).double()
    gram = columns.T @ columns
    factors = torch.linalg.lstsq(gram, columns.T @ wanted).solution
    left = (columns @ factors - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float(left), factors.reshape(-1).tolist()


def placement_of(sublayers: Sequence[Sublayer]) -> str:
    """The placement that most sublayers have."""
    return Counter(sublayer.placement for sublayer in sublayers).most_common(1)[0][0]
