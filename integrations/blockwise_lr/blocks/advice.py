"""The rules to propose for parameters that no rule matches: exact names, once for all layers, and nothing that is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .globs import matches
from .layout import ParamLayout
from .types import BlockType

Unmapped = Sequence[tuple[str, tuple[int, ...]]]
_SHOWN = 6  # rules in a message; all of them are the error's ``rules``


def suggested_rules(unmapped: Unmapped, known: Mapping[str, ParamLayout]) -> list[dict[str, str]]:
    """Rules that match every unmapped parameter and none of the known ones.

    Args:
        unmapped: (name, shape), in the model's order, names without the prefixes of wrappers.
        known: the layouts of all other parameters, under such names.

    Returns:
        Block rules in JSON's form. The block type is that of the known parameters beside the unknown one; it is a
        proposal, which only its forward pass can prove.
    """
    blocks = _blocks_below(known)
    dims: dict[str, int] = {}  # a bias is what its weight is
    for name, shape in unmapped:
        module = name.rpartition(".")[0]
        dims[module] = max(dims.get(module, 0), len(shape))
    groups: dict[tuple[str, BlockType], dict[str, list[str]]] = {}
    for name, _ in unmapped:
        module, _, leaf = name.rpartition(".")
        key = (_every_layer(module), _evidence(module, dims[module], blocks))
        groups.setdefault(key, {}).setdefault(leaf, []).append(name)
    wanted = {name: block for (_, block), leaves in groups.items() for group in leaves.values() for name in group}
    rules: list[dict[str, str]] = []
    left = dict(wanted)
    for (module, block), leaves in groups.items():
        glob = _glob(module, leaves)
        taken = [name for name in wanted if matches(glob, name)]
        names = [name for group in leaves.values() for name in group if name in left]
        # a star also stands for dots, so it may reach further than from layer to layer
        alone = all(wanted[name] is block for name in taken) and not any(matches(glob, name) for name in known)
        for one in [glob] if alone and names else names:
            rules.append({"match": one, "block": block.value})
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


def _evidence(module: str, dims: int, blocks: Mapping[str, Counter[BlockType]]) -> BlockType:
    """The commonest block type in a parameter's module or the one around that; qk and vo together: vo, whose
    learning rate is smaller. Without such neighbours a vector is a norm, and anything else ffn."""
    for prefix in (module, module.rpartition(".")[0]):
        found = blocks.get(prefix)
        if found and set(found) == {BlockType.QK, BlockType.VO}:
            return BlockType.VO
        if found and not prefix.rpartition(".")[2].isdigit():
            return found.most_common(1)[0][0]
    return BlockType.NORM if dims <= 1 else BlockType.FFN


def advice(unmapped: Unmapped, rules: Sequence[Mapping[str, str]], nearest: str) -> str:
    """The sentence of an UnmappedParameterError."""
    name, shape = unmapped[0]
    more = f"{', '.join(n for n, _ in unmapped[1:4])}{', …' if len(unmapped) > 4 else ''}"
    rest = f" ({len(unmapped) - 1} more: {more})" if len(unmapped) > 1 else ""
    shown = ", ".join(json.dumps(rule) for rule in rules[:_SHOWN])
    cut = f" and {len(rules) - _SHOWN} more, which the error's `rules` hold" if len(rules) > _SHOWN else ""
    return (
        f"no block rule matches the parameter {name} of shape {tuple(shape)}{rest}; nearest rule: {nearest!r}; check the "
        f"block types and add to block_rules [{shown}]{cut}"
    )
