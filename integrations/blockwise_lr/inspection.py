"""The table of ``blockwise-lr inspect``: the block type, learning rate and weight decay of every parameter."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .argument_file import megatron_model
from .blocks import PRESETS, BlockError, BlockMap, BlockType, ParamLayout, lr_ratios, map_blocks
from .blocks.presets import SIZES
from .plan.step_plan import StepClass
from .rules.options import OptimizerOptions
from .rules.param_groups import class_decay, group_lr


@dataclass(frozen=True)
class Row:
    """One block type of one parameter.

    Attributes:
        parameter: its name.
        shape: its shape.
        where: the rows or columns, or "all" for the whole parameter.
        block: the block type, the block of the user's own whose ratio it has in its place, or "UNMAPPED".
        ratio: peak learning rate over the base learning rate.
        peak_lr: ratio * lr.
        weight_decay: the weight decay that the optimizer applies.
        numel: elements of that block type.
    """

    parameter: str
    shape: tuple[int, ...]
    where: str
    block: str
    ratio: float
    peak_lr: float
    weight_decay: float
    numel: int


UNMAPPED = "UNMAPPED"


def load_model(target: str, vocabulary: int | None = None) -> torch.nn.Module:
    """Builds a target's model on the meta device, without allocating or loading weights.

    Args:
        target: a folder with a Hugging Face config.json, that file, a Megatron argument file (any other file), or
            ``package.module:factory``, a function without arguments that returns a module.
        vocabulary: rows of the embedding, for an argument file that does not state them.

    Raises:
        BlockError: the target is none of these, or its model cannot be built.
    """
    path = Path(target)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _hugging_face_model(path) if path.suffix == ".json" else megatron_model(path, vocabulary)
    if ":" not in target:
        raise BlockError(f"{target!r} is no file, no folder with a config.json, and no package.module:factory")
    build = find_factory(target)
    with torch.device("meta"):
        model = build()
    if not isinstance(model, torch.nn.Module):
        raise BlockError(f"{target!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def find_factory(target: str) -> Callable[[], Any]:
    """The function that ``package.module:factory`` names, from the current folder or what is installed.

    Raises:
        BlockError: there is none.
    """
    module, _, factory = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise BlockError(f"cannot find {target!r}: {error}") from error


def _hugging_face_model(path: Path) -> torch.nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise BlockError(
            "reading a Hugging Face config needs transformers; install blockwise-lr[transformers]"
        ) from error
    try:
        values = json.loads(path.read_text())
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    except (json.JSONDecodeError, KeyError, ValueError) as error:
        raise BlockError(f"{path} is no Hugging Face config that this transformers knows: {error}") from error
    with torch.device("meta"):
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        return architecture(config) if architecture else transformers.AutoModelForCausalLM.from_config(config)


def inspect_model(
    model: torch.nn.Module,
    *,
    rules: Iterable[dict] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    ratios: Mapping[str, float | str] | None = None,
) -> list[Row]:
    """The rows of the table; a parameter that no rule matches has the block "UNMAPPED".

    Args:
        model: any module, also on the meta device.
        rules, lr, weight_decay, ratios: the optimizers' block_rules, lr, weight_decay and block_lr_ratios.

    Raises:
        BlockError: a bad rule, setting or ratio, or head counts that do not fit the shapes.
    """
    block_map = map_blocks(model, rules=rules, strict=False, family=getattr(model, "blockwise_family", None))
    options = dict(lr=lr, weight_decay=weight_decay, block_lr_ratios=ratios)
    group = OptimizerOptions.checked(options, own=block_map.own_blocks, config=block_map.config).group_defaults()
    return [row for name in block_map for row in _rows(name, block_map, group)]


@dataclass(frozen=True)
class PresetRow:
    """What a preset of ratios gives a model.

    Attributes:
        name: of the preset.
        ratios: block type of the model -> peak learning rate over the base learning rate; empty where a size is missing.
        source: who found them, on what; what a model must have for them.
        missing: what it needs and was not given.
    """

    name: str
    ratios: dict[str, float]
    source: str
    missing: str


def inspect_presets(
    model: torch.nn.Module, *, rules: Iterable[dict] | None = None, ratios: Mapping[str, Any] | None = None
) -> list[PresetRow]:
    """What every preset gives a model.

    Args:
        model, rules: as for :func:`inspect_model`.
        ratios: sizes for the presets that depend on them (``base_hidden_size``, ...), and ratios that take the place of all
            presets'.

    Raises:
        BlockError: a bad rule, size or ratio.
    """
    block_map = map_blocks(model, rules=rules, strict=False, family=getattr(model, "blockwise_family", None))
    blocks = [block for block in BlockType if block_map.block_numel().get(block)]
    own = {name: 1.0 if ratio is None else ratio for name, ratio in block_map.own_blocks.items()}
    given = {key: value for key, value in (ratios or {}).items() if key not in ("preset", *SIZES)}
    lr_ratios(given, own)
    rows = []
    for name, preset in PRESETS.items():
        sizes = {key: value for key, value in (ratios or {}).items() if key in preset.sizes}
        try:
            found = lr_ratios({"preset": name, **sizes, **given}, own, block_map.config)
            rows.append(PresetRow(name, {str(block): found[block] for block in blocks}, preset.source, ""))
        except BlockError as error:
            rows.append(PresetRow(name, {}, preset.source, str(error)))
    return rows


def _rows(name: str, block_map: BlockMap, group: dict[str, Any]) -> list[Row]:
    layout, rows = block_map[name], []
    for block, numel in layout.block_numel().items():
        of, rate = StepClass(block, layout.kind, layout.own, layout.lr_scale), layout.rate(block)
        where = "all" if len(layout.blocks) == 1 else _where(layout, block)
        rows.append(
            Row(
                name,
                layout.shape,
                where,
                UNMAPPED if name in block_map.unmapped else rate.block,
                group["block_lr_ratios"][rate.block] * rate.scale,
                group_lr(group, rate),
                class_decay(group, of),
                numel,
            )
        )
    return rows


def _where(layout: ParamLayout, block: BlockType) -> str:
    axis = "columns" if layout.transposed else "rows"
    spans: list[list[int]] = []
    for start, end, piece in layout.spans():
        if piece.block is not block:
            continue
        if spans and spans[-1][1] == start:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    shown = ", ".join(f"{start}–{end - 1}" for start, end in spans[:2])
    return f"{axis} {shown}{f', … ({len(spans)} ranges)' if len(spans) > 2 else ''}"


def folded(rows: list[Row]) -> list[tuple[Row, int]]:
    """The rows with those of repeated layers and experts in one, named as ``layers.{0-31}.mlp.up_proj.weight``.

    Rows are together where they differ in nothing but the numbers in their names.

    Returns:
        a row and how many it stands for, whose elements it has together; in the order of the first ones.
    """
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (_NUMBER.sub("", row.parameter), row.shape, row.where, row.block, row.ratio, row.weight_decay)
        together.setdefault(key, []).append(row)
    return [
        (replace(same[0], parameter=_common_name(same), numel=sum(row.numel for row in same)), len(same))
        for same in together.values()
    ]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def _common_name(rows: list[Row]) -> str:
    """One name for rows that differ in numbers only."""
    columns = iter(zip(*(map(int, _NUMBER.findall(row.parameter)) for row in rows)))
    return _NUMBER.sub(lambda _: _span(sorted(set(next(columns)))), rows[0].parameter)


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    first, last = numbers[0], numbers[-1]
    if last - first + 1 == len(numbers):
        return f"{{{first}-{last}}}"
    shown = [*map(str, numbers[:3]), f"...{last}"] if len(numbers) > 4 else list(map(str, numbers))
    return f"{{{','.join(shown)}}}"


def totals(rows: list[Row]) -> dict[str, int]:
    """Elements per block type."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.block] = counts.get(row.block, 0) + row.numel
    return counts


def as_json(rows: list[Row]) -> str:
    """The table as JSON: ``{"parameters": [fields of Row, ...], "totals": {block: elements}}``."""
    return json.dumps({"parameters": [asdict(row) for row in rows], "totals": totals(rows)}, indent=1)
