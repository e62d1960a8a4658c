"""What a saved optimizer state says about its origin, and what of it contradicts the optimizer that is to load it."""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..blocks.block_map import plain_name
from ..blocks.layout import ParamLayout, Piece
from ..blocks.types import BlockType
from ..collective.errors import is_rank_zero
from ..rules.base import UpdateRule, rule_of_class
from .errors import CheckpointError, MismatchError
from .matching import Contents
from .target import in_parameters

log = logging.getLogger("blockwise_lr")

# Key of the record in the param groups of a state dict: every format, also DeepSpeed's universal one, carries param
# groups along.
KEY = "blockwise_lr"
# Raised when an older package could misread what a newer one wrote. 2: the record is a packed string, and says what lies
# in each tensor; second moments per output unit. 3: blocks and factors of the user's own; without such, 2 is written.
FORMAT = 3
_WITHOUT_OWN_RATES = 2
# the forms in which exp_avg_sq is saved: a value per element, per segment of the tensor's plan, or per output unit of the
# parameter (a row, or a column of a transposed weight), which needs no plan to be read
ELEMENTS, SEGMENTS, UNITS = "elements", "segments", "units"
_PACKED = "blockwise_lr record "
_SHOWN = 4


@dataclass(frozen=True)
class Record:
    """The origin of a saved optimizer state.

    Attributes:
        optimizer: class name.
        version: version of blockwise_lr that wrote it.
        fingerprint: that of its block map.
        layouts: plain parameter name -> its layout.
        settings: per param group, the settings the optimizer was built with.
        bias_segments: Adam-mini's setting; None for other optimizers.
        second_moment: "elements", "segments" or "units": the form a segment state is saved in.
        row_parts: in how many segments Adam-mini cuts the rows that tensor-parallel ranks hold parts of.
        tensors: per param group, what lies in each of its tensors; None where that is not to be compared.
        format: number of the format.
    """

    optimizer: str
    version: str
    fingerprint: str
    layouts: Mapping[str, ParamLayout]
    settings: Sequence[Mapping[str, Any]]
    bias_segments: str | None = None
    second_moment: str = ELEMENTS
    row_parts: int = 1
    tensors: Sequence[Sequence[Contents]] | None = None
    format: int = FORMAT

    def layout(self, name: str) -> ParamLayout:
        """The saved layout of a parameter of this run.

        Raises:
            CheckpointError: there is none.
        """
        layout = self.layouts.get(plain_name(name))
        if layout is None:
            raise CheckpointError(f"the checkpoint knows no parameter {name}; it is of another model")
        return layout

    @property
    def rule(self) -> UpdateRule | None:
        """That of the optimizer; None for one that this package does not know."""
        return rule_of_class(self.optimizer)

    @property
    def has_segments(self) -> bool:
        """Whether the optimizer keeps a state per segment."""
        return self.rule is not None and self.rule.segment_state is not None

    def setting_names(self) -> list[str]:
        """The settings of param groups that it tells of."""
        return list(dict.fromkeys(key for group in self.settings for key in group))

    def settings_of(self, number: int) -> Mapping[str, Any]:
        """The settings of a param group; of all groups, where the framework makes the groups itself."""
        return self.settings[min(number, len(self.settings) - 1)]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings: loadable without this package, and as JSON."""
        layouts = {
            name: [
                list(p.shape),
                p.repeat,
                p.transposed,
                p.batch_dims,
                p.kind,
                [[piece.block.value, piece.size, piece.unit, piece.role] for piece in p.pieces],
                *([p.own, p.lr_scale] if p.has_own_rate else ()),
            ]
            for name, p in self.layouts.items()
        }
        settings = [{key: plain(value) for key, value in group.items()} for group in self.settings]
        tensors = (
            None
            if self.tensors is None
            else [[[list(fragment) for fragment in contents] for contents in group] for group in self.tensors]
        )
        return {
            "format": FORMAT if any(p.has_own_rate for p in self.layouts.values()) else _WITHOUT_OWN_RATES,
            "version": self.version,
            "optimizer": self.optimizer,
            "fingerprint": self.fingerprint,
            "bias_segments": self.bias_segments,
            "second_moment": self.second_moment,
            "row_parts": self.row_parts,
            "settings": settings,
            "layouts": layouts,
            "tensors": tensors,
        }

    def packed(self) -> str:
        """:meth:`as_dict` as one short string, which every checkpoint format carries along in a param group."""
        return _PACKED + base64.b64encode(zlib.compress(json.dumps(self.as_dict()).encode(), 9)).decode()

    @classmethod
    def of_groups(cls, groups: Iterable[Mapping[str, Any]]) -> Record | None:
        """The record in the param groups of a saved state; None where another optimizer saved it.

        Raises:
            CheckpointError: as :meth:`from_dict`.
        """
        saved = next((group[KEY] for group in groups if KEY in group), None)
        if isinstance(saved, str):
            try:
                saved = json.loads(zlib.decompress(base64.b64decode(saved.removeprefix(_PACKED), validate=True)))
            except (ValueError, zlib.error) as error:
                raise CheckpointError(
                    f"the checkpoint's record of its origin is damaged ({error}); load another checkpoint"
                ) from error
        return None if saved is None else cls.from_dict(saved)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Record:
        """Reads :meth:`as_dict`.

        Raises:
            CheckpointError: a newer format, or not a record at all.
        """
        number = saved.get("format") if isinstance(saved, Mapping) else None
        if not isinstance(number, int) or number > FORMAT:
            raise CheckpointError(
                f"the checkpoint was written by blockwise-lr {saved.get('version', '?')} in format "
                f"{number!r}, and this version reads up to format {FORMAT}; install "
                f"blockwise-lr>={saved.get('version', '?')} to load it"
            )
        try:
            layouts = {
                name: ParamLayout(
                    name,
                    tuple(shape),
                    tuple(Piece(BlockType(b), size, unit, role) for b, size, unit, role in pieces),
                    repeat,
                    transposed,
                    batch_dims,
                    kind,
                    *own_rate,
                )
                for name, (shape, repeat, transposed, batch_dims, kind, pieces, *own_rate) in saved["layouts"].items()
            }
            return cls(
                saved["optimizer"],
                saved["version"],
                saved["fingerprint"],
                layouts,
                saved["settings"],
                saved["bias_segments"],
                saved["second_moment"],
                saved.get("row_parts", 1),
                _tensors(saved.get("tensors")),
                number,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint's record of its origin is damaged ({type(error).__name__}: {error}); "
                f"load another checkpoint"
            ) from error


def _tensors(saved: Any) -> Sequence[Sequence[Contents]] | None:
    return (
        None
        if saved is None
        else [
            [
                tuple((str(name), int(start), int(numel), int(offset)) for name, start, numel, offset in contents)
                for contents in group
            ]
            for group in saved
        ]
    )


def by_names(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Saved param groups whose states have been brought to this run's shards by parameter names, a value per element: the
    record in them tells of the origin alone, and no longer where in the saving ranks' shards anything lay."""
    copies = [dict(group) for group in groups]
    record = Record.of_groups(copies)
    if record is not None:
        packed = replace(record, tensors=None, second_moment=ELEMENTS).packed()
        for group in copies:
            group[KEY] = packed
    return copies


@dataclass(frozen=True)
class Difference:
    """One contradiction: the name to accept it by (None where that is impossible) and one line that tells it."""

    key: str | None
    text: str


def differences(saved: Record, now: Record) -> list[Difference]:
    """Everything in which a checkpoint contradicts the optimizer that is to load it."""
    found = []
    if saved.optimizer != now.optimizer:
        found.append(Difference("optimizer", f"optimizer: {saved.optimizer} -> {now.optimizer}"))
    if saved.fingerprint != now.fingerprint:
        found += _map_differences(saved, now)
    if len(saved.settings) != len(now.settings):
        found.append(Difference(None, f"param groups: {len(saved.settings)} -> {len(now.settings)}"))
    for key in _compared(saved, now):
        found += _setting_difference(key, saved, now)
    if saved.bias_segments != now.bias_segments and None not in (saved.bias_segments, now.bias_segments):
        found.append(Difference("bias_segments", f"bias_segments: {saved.bias_segments} -> {now.bias_segments}"))
    return found


def _map_differences(saved: Record, now: Record) -> list[Difference]:
    gone, new = sorted(saved.layouts.keys() - now.layouts.keys()), sorted(now.layouts.keys() - saved.layouts.keys())
    shared = [name for name in now.layouts if name in saved.layouts]
    shapes = [
        f"{name} {saved.layouts[name].shape} -> {now.layouts[name].shape}"
        for name in shared
        if saved.layouts[name].shape != now.layouts[name].shape
    ]
    with_heads = saved.has_segments or now.has_segments
    rules = [
        f"{name} {_shown(saved.layouts[name])} -> {_shown(now.layouts[name])}"
        for name in shared
        if saved.layouts[name].shape == now.layouts[name].shape
        and _meaning(saved.layouts[name], with_heads) != _meaning(now.layouts[name], with_heads)
    ]
    found = []
    if gone or new or shapes:
        parts = [
            f"{label} {_some(names)}"
            for label, names in (
                ("only in the checkpoint:", gone),
                ("only in the model:", new),
                ("other shape:", shapes),
            )
            if names
        ]
        found.append(Difference(None, f"model: {'; '.join(parts)}"))
    if rules:
        found.append(Difference("block_map", f"block_map: {_some(rules)}"))
    rates = [
        f"{name} {_rate_shown(saved.layouts[name])} -> {_rate_shown(now.layouts[name])}"
        for name in shared
        if (saved.layouts[name].own, saved.layouts[name].lr_scale)
        != (now.layouts[name].own, now.layouts[name].lr_scale)
    ]
    if rates:  # what they are is the same, and so is what is kept of them
        found.append(Difference("block_lr_ratios", f"block_lr_ratios: by block_rules, {_some(rates)}"))
    return found


def _rate_shown(layout: ParamLayout) -> str:
    """Whose ratio a parameter trains at, and times what."""
    whose = layout.own or "/".join(block.value for block in layout.blocks)
    return whose if layout.lr_scale == 1 else f"{whose} x {layout.lr_scale:.4g}"


def same_segments(saved: Record | None, now: Record) -> bool:
    """Whether both have the same rule and the same segments, so that one saved element stands for all of its segment."""
    return (
        saved is not None
        and saved.optimizer == now.optimizer
        and now.rule is not None
        and now.rule.segment_state is not None
        and saved.bias_segments == now.bias_segments
        and saved.row_parts == now.row_parts
        and _without_rates(saved) == _without_rates(now)
    )


def _without_rates(record: Record) -> dict[str, ParamLayout]:
    return {name: replace(layout, own="", lr_scale=1.0) for name, layout in record.layouts.items()}


def _meaning(layout: ParamLayout, with_heads: bool) -> tuple:
    pieces = tuple((p.block, p.size, p.unit if with_heads else None) for p in layout.pieces)
    return pieces, layout.repeat, layout.transposed, layout.batch_dims, layout.kind


def _shown(layout: ParamLayout) -> str:
    parts = (
        [
            "+".join(
                f"{p.size} {p.role or p.block.value}{f' in heads of {p.unit}' if (p.unit or 0) > 1 else ''}"
                for p in layout.pieces
            )
        ]
        if len(layout.pieces) > 1 or (layout.pieces[0].unit or 0) > 1
        else []
    )
    return f"{'/'.join(b.value for b in layout.blocks)}{f' ({parts[0]} x {layout.repeat})' if parts else ''}"


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _compared(saved: Record, now: Record) -> list[str]:
    """The settings to compare: what only one of two rules has is told by their names."""
    before, after = saved.setting_names(), now.setting_names()
    if saved.optimizer == now.optimizer:
        return list(dict.fromkeys([*after, *before]))
    return [key for key in after if key in before]


def _setting_difference(key: str, saved: Record, now: Record) -> list[Difference]:
    for number, (old, new) in enumerate(zip(saved.settings, now.settings)):
        before, after = plain(old.get(key)), plain(new.get(key))
        if before == after:
            continue
        where = f" (param group {number})" if len(now.settings) > 1 else ""
        if isinstance(before, dict) and isinstance(after, dict):
            changed = [
                f"{block} {before.get(block, 'unset')} -> {after.get(block, 'unset')}"
                for block in {**before, **after}
                if before.get(block) != after.get(block)
            ]
            return [Difference(key, f"{key}{where}: {', '.join(changed)}")]
        return [Difference(key, f"{key}{where}: {before} -> {after}")]
    return []


def plain(value: Any) -> Any:
    """A setting as it comes back from a file: tuples are lists."""
    return list(value) if isinstance(value, tuple) else value


def reject_mismatches(
    found: Sequence[Difference],
    accepted: Iterable[str],
    origin: str,
    to_accept: Callable[[Sequence[str]], str] = in_parameters,
) -> None:
    """Refuses differences that are not accepted and logs those that are.

    Args:
        found: from :func:`differences`.
        accepted: the optimizer's ``accept_mismatch``.
        origin: what is being loaded, for the message.
        to_accept: tells what to write to accept the differences it is given the keys of.

    Raises:
        MismatchError: names every refused difference, what to pass to go on anyway, or that nothing can be passed.
    """
    refused = [d for d in found if d.key is None or d.key not in accepted]
    if refused:
        keys = list(dict.fromkeys([*accepted, *(d.key for d in refused if d.key)]))
        impossible = [d for d in refused if d.key is None]
        if impossible:
            remedy = (
                "this optimizer state does not fit the model; start with the model and param groups it was saved "
                "from, or load the weights alone"
            )
        else:
            remedy = f"to go on with the new ones, {to_accept(keys)}; otherwise restore the old ones"
        lines = "".join(f"\n  {d.text}" for d in refused)
        raise MismatchError(f"{origin} contradicts this run (checkpoint -> now):{lines}\n{remedy}")
    if is_rank_zero():
        for difference in found:
            log.warning("%s: going on with accepted difference (checkpoint -> now): %s", origin, difference.text)


def plain_layouts(layouts: Mapping[str, ParamLayout]) -> dict[str, ParamLayout]:
    """Layouts by plain name, so that wrappers around the model (torch.compile, DDP) do not matter."""
    return {plain_name(name): replace(layout, name=plain_name(name)) for name, layout in layouts.items()}
