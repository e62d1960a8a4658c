"""The rules to propose for parameters that no rule matches: exact names, once for all layers, and nothing that is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .globs import matches
from .layout import ParamLayout
from .types import BlockType

Unmapped = Sequence[tuple[str, tuple[int, ...]]]
_SHOWN = 6  # rules in a message; all of them are the error's ``rules``


def suggested_rules(unmapped: Unmapped, known: Mapping[str, ParamLayout]) -> list[dict[str, Any]]:
    """Rules that match every unmapped parameter and none of the known ones.

    Args:
        unmapped: (name, shape), in the model's order, names without the prefixes of wrappers.
        known: the layouts of all other parameters, under such names.

    Returns:
        Block rules in JSON's form. What they say follows from the known parameters beside the unknown one and from a few
        words and shapes; it is a proposal, which only its forward pass can prove.
    """
    evidence = _Evidence(unmapped, known)
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, _ in unmapped:
        module, _, leaf = name.rpartition(".")
        key = (_every_layer(module), json.dumps(evidence.of(module)))
        groups.setdefault(key, {}).setdefault(leaf, []).append(name)
    wanted = {name: says for (_, says), leaves in groups.items() for group in leaves.values() for name in group}
    rules: list[dict[str, Any]] = []
    left = dict(wanted)
    for (module, says), leaves in groups.items():
        glob = _glob(module, leaves)
        taken = [name for name in wanted if matches(glob, name)]
        names = [name for group in leaves.values() for name in group if name in left]
        # a star also stands for dots, so it may reach further than from layer to layer
        alone = all(wanted[name] == says for name in taken) and not any(matches(glob, name) for name in known)
        for one in [glob] if alone and names else names:
            rules.append({"match": one, **json.loads(says)})
        for name in taken if alone else names:
            left.pop(name, None)
    return rules


def _every_layer(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _glob(module: str, leaves: Iterable[str]) -> str:
    found = ["*" if leaf.isdigit() else leaf for leaf in leaves]
    leaf = found[0] if len(set(found)) == 1 else "{" + ",".join(dict.fromkeys(found)) + "}"
    return f"{module}.{leaf}" if module else leaf


def _blocks_below(known: Mapping[str, ParamLayout]) -> dict[str, Counter[BlockType]]:
    """Module name -> how many parameters below it are of each block type but norm."""
    found: dict[str, Counter[BlockType]] = {}
    for name, layout in known.items():
        prefix = name
        while prefix := prefix.rpartition(".")[0]:
            found.setdefault(prefix, Counter()).update(b for b in layout.blocks if b is not BlockType.NORM)
    return found


class _Evidence:
    """What the modules of unknown parameters may be."""

    def __init__(self, unmapped: Unmapped, known: Mapping[str, ParamLayout]) -> None:
        self._blocks = _blocks_below(known)
        tables = {layout.shape for layout in known.values() if BlockType.EMBEDDING in layout.blocks}
        self._tables = {shape for shape in tables if len(set(shape)) > 1}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of a module's largest parameter: a bias is what its weight is
        for name, shape in unmapped:
            module = name.rpartition(".")[0]
            self._shapes[module] = max(self._shapes.get(module, ()), tuple(shape), key=len)
        self._attention = {module.rpartition(".")[0] for module in self._shapes if self._is_fused(module)} - {""}

    def of(self, module: str) -> dict[str, Any]:
        """What a rule says. A fused projection, by its name and shape, is split evenly; what else is unknown in its module,
        vo. An output layer has the shape of the embedding. Then the commonest block type in the module or the one around
        that; qk and vo together: vo, whose learning rate is smaller. Without such neighbours a vector is a norm, and
        anything else ffn."""
        if self._is_fused(module):
            rows, columns = self._shapes[module]
            if rows == 3 * columns:
                return {"split": {"q": 1, "k": 1, "v": 1}}
            return {"block": BlockType.VO.value}  # of grouped queries, in shares that no shape tells
        if self._shapes[module] in self._tables:
            return {"block": BlockType.HEAD.value}
        for prefix in (module, module.rpartition(".")[0]):
            found = self._blocks.get(prefix)
            if prefix in self._attention or (found and set(found) == {BlockType.QK, BlockType.VO}):
                return {"block": BlockType.VO.value}
            if found and not prefix.rpartition(".")[2].isdigit():
                return {"block": found.most_common(1)[0][0].value}
        return {"block": (BlockType.NORM if len(self._shapes[module]) <= 1 else BlockType.FFN).value}

    def _is_fused(self, module: str) -> bool:
        return "qkv" in module.rpartition(".")[2].lower() and len(self._shapes[module]) == 2


def advice(unmapped: Unmapped, rules: Sequence[Mapping[str, str]], nearest: str) -> str:
    """The sentence of an UnmappedParameterError."""
    name, shape = unmapped[0]
    more = f"{', '.join(n for n, _ in unmapped[1:4])}{', …' if len(unmapped) > 4 else ''}"
    rest = f" ({len(unmapped) - 1} more: {more})" if len(unmapped) > 1 else ""
    shown = ", ".join(json.dumps(rule) for rule in rules[:_SHOWN])
    cut = f" and {len(rules) - _SHOWN} more, which the error's `rules` hold" if len(rules) > _SHOWN else ""
    return (
        f"no block rule matches the parameter {name} of shape {tuple(shape)}{rest}; nearest rule: {nearest!r}; add to "
        f"block_rules, once you have checked them (they are guesses; blockwise-lr inspect --verify says what feeds the "
        f"attention), [{shown}]{cut}"
    )
