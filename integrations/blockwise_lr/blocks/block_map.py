"""BlockMap: the block type of every row of every trainable parameter of a model."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .advice import advice, suggested_rules
from .depth import Depths
from .dims import HeadCounts
from .families import family_rules
from .globs import matches
from .layout import MATRIX, ParamLayout, Piece, Rate
from .lookup import alias_layout, depths_of
from .marks import marks_of
from .names import plain_name
from .rates import with_rates
from .rules import Rule
from .structure import Context, Structure, read_structure
from .types import BlockError, BlockType
from .user_rules import own_blocks, user_rules


class UnmappedParameterError(BlockError):
    """A trainable parameter matches no rule.

    Attributes:
        rules: block rules that would map all such parameters and none of the others, to check and to add.
    """

    def __init__(self, message: str, rules: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.rules = [dict(rule) for rule in rules]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rules)


class BlockMap(Mapping[str, ParamLayout]):
    """Parameter name -> :class:`ParamLayout`, for every trainable parameter exactly once (tied ones under one name).

    Names are those of ``model.named_parameters()``, with wrapper prefixes, in the model's order. Copies and pickles
    keep names and layouts, but not the tensors given to :meth:`bind`.

    Attributes:
        heads: the head counts the map was made with, or None.
        unmapped: names that no rule matches; they have the base learning rate. Empty unless made with strict=False.
        frozen: layouts of the parameters without gradients, for :meth:`unfreeze`; None where no rule matches.
        own_blocks: the blocks of the user's own that its rules make: name -> the ratio they state, None where they state none.
        unused_rules: the user's rules that match nothing in a part of a model.
    """

    unused_rules: tuple[Rule, ...] = ()

    def __init__(
        self,
        layouts: Iterable[ParamLayout],
        heads: HeadCounts | None = None,
        unmapped: Iterable[str] = (),
        frozen: Mapping[str, ParamLayout | None] | None = None,
        own_blocks: Mapping[str, float | None] | None = None,
    ) -> None:
        self._layouts = {layout.name: layout for layout in layouts}
        self.heads = heads
        self.unmapped = frozenset(unmapped)
        self.frozen: dict[str, ParamLayout | None] = dict(frozen or {})
        self.own_blocks: dict[str, float | None] = dict(own_blocks or {})
        # weak references, because id() values are reused once a tensor is freed
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_names": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"own_blocks": {}, **state})  # earlier versions had none
        self._names = WeakIdKeyDictionary()

    def __getitem__(self, name: str) -> ParamLayout:
        return self._layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def bind(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Records the name of each tensor, so that optimizers can be given tensors without names."""
        for name, tensor in named:
            if name in self._layouts or name in self.frozen:
                self._names[tensor] = name

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name of a bound tensor, or None."""
        return self._names.get(tensor)

    def require_name(self, tensor: torch.Tensor) -> str:
        """The name of a bound tensor.

        Raises:
            BlockError: the tensor was not given to :meth:`bind`.
        """
        name = self.name_of(tensor)
        if name is None:
            raise BlockError(
                f"a tensor of shape {tuple(tensor.shape)} is not in the block map; make the map from the model that "
                f"is trained, or bind the tensor's name with block_map.bind([(name, tensor)])"
            )
        return name

    def add(self, other: BlockMap) -> None:
        """Appends the parameters of another map."""
        self._layouts.update(other)
        self.frozen = {**self.frozen, **other.frozen}
        self.unmapped |= other.unmapped
        self.own_blocks |= other.own_blocks
        self._names.update(other._names)

    def unfreeze(self, name: str) -> None:
        """Adds a parameter that was frozen when the map was made, because it is trained from now on.

        Raises:
            UnmappedParameterError: no rule matches it.
        """
        layout = self.frozen.get(name)
        if layout is None:
            raise UnmappedParameterError(
                f"no block rule matches {name}, which was frozen when the optimizer was built and has a gradient now; "
                f'add one to block_rules, for example {{"match": "{name}", "block": "ffn"}}'
            )
        self._layouts[name] = layout
        del self.frozen[name]

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the model, which the head counts were read from; empty where they were not."""
        return {} if self.heads is None else self.heads.config

    def block_numel(self) -> dict[BlockType, int]:
        """Elements per block type, over all parameters."""
        counts = dict.fromkeys(BlockType, 0)
        for layout in self.values():
            for block, numel in layout.block_numel().items():
                counts[block] += numel
        return {block: numel for block, numel in counts.items() if numel}

    def rate_numel(self, names: Container[str] | None = None) -> dict[Rate, int]:
        """Elements (of these parameters alone) by what their learning rates follow from: block types in their order, then
        the user's own blocks."""
        counts: dict[Rate, int] = {}
        for layout in self.values() if names is None else (self[name] for name in self if name in names):
            for block, numel in layout.block_numel().items():
                rate = layout.rate(block)
                counts[rate] = counts.get(rate, 0) + numel
        order = {name: number for number, name in enumerate([*(block.value for block in BlockType), *self.own_blocks])}
        return {rate: counts[rate] for rate in sorted(counts, key=lambda rate: (order[rate.block], rate.scale))}

    def fingerprint(self) -> str:
        """A SHA-256 prefix of names, shapes and layouts; the same in every process and version of Python."""
        entries = [
            (
                p.name,
                p.shape,
                p.repeat,
                p.transposed,
                p.batch_dims,
                p.kind,
                [(piece.block.value, piece.size, piece.unit) for piece in p.pieces],
                *([p.own, p.lr_scale] if p.has_own_rate else ()),
            )
            for p in self.values()
        ]
        return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()[:16]


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The unpartitioned shape of a parameter, also under ZeRO-3, whose parameters are empty placeholders.

    Raises:
        BlockError: the parameter is part of an FSDP1 flat parameter, which has no rows.
    """
    if getattr(parameter, "_fsdp_flattened", False):
        raise BlockError(
            "the parameters are wrapped in FullyShardedDataParallel (FSDP1), whose shards are vectors without "
            "rows; use torch.distributed.fsdp.fully_shard (FSDP2), and build the optimizer after it"
        )
    return marks_of(parameter).shape or tuple(parameter.shape)


def embedding_copies(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of parameters tied to the embedding of another pipeline stage."""
    return [name for name, p in named if marks_of(p).is_tied_copy]


def map_blocks(
    model: torch.nn.Module,
    *,
    rules: Iterable[Rule | dict] | None = None,
    strict: bool = True,
    config: Any = None,
    family: str | None = None,
    elsewhere: Iterable[str] | None = None,
) -> BlockMap:
    """Maps every trainable parameter of a model to block types.

    Args:
        model: any module; parameters may be on the meta device or partitioned by ZeRO-3.
        rules: user rules, tried before all others, e.g. ``[{"match": "*.adapter.*", "block": "ffn"}]``.
        strict: refuse parameters that no rule matches; otherwise they get the base learning rate (block type ``norm``).
        config: where to read the numbers of heads; ``model.config`` by default.
        family: the naming table to use; the config's ``model_type`` by default.
        elsewhere: names of the model's parameters that are not in this module (those of other pipeline stages): they count
            as layers, and rules that match nothing here are not refused but in the map's ``unused_rules``.

    Returns:
        The map, with the model's parameters bound to their names.

    Raises:
        UnmappedParameterError: strict, and no rule matches some names; the message lists them and the rule to add.
        BlockError: a bad rule, a rule that matches nothing, or head counts that do not fit the shapes.
    """
    structure = read_structure(model, config, family)
    everything = list(model.named_parameters(remove_duplicate=False))
    named = [(name, p) for name, p in everything if p.requires_grad]
    frozen = [(name, p) for name, p in everything if not p.requires_grad]
    own = user_rules(rules)
    shapes = {name: full_shape(p) for name, p in named}
    aliases, names = _aliases(named), [*(name for name, _ in everything), *(elsewhere or ())]
    depths = depths_of(shapes, own, structure, aliases, names)
    copies, whole = embedding_copies(named), elsewhere is None
    off = [name for name, _ in frozen]
    block_map = _map(shapes, own, strict, structure, aliases, copies, depths=depths, whole=whole, frozen=off)
    block_map.frozen = _frozen_layouts(frozen, own, structure, depths)
    block_map.bind(everything)
    return block_map


def _aliases(named: Iterable[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """The names of each parameter, in the model's order."""
    aliases: dict[int, list[str]] = {}
    for name, p in named:
        aliases.setdefault(id(p), []).append(name)
    return list(aliases.values())


def _frozen_layouts(
    frozen: Sequence[tuple[str, torch.Tensor]],
    own: tuple[Rule, ...],
    structure: Structure,
    depths: Depths | None,
) -> dict[str, ParamLayout | None]:
    """The layouts of frozen parameters, in case they are trained later; None instead of an error."""
    found: dict[str, ParamLayout | None] = {}
    tensors = dict(frozen)
    rules = own + tuple(Rule(name, BlockType.EMBEDDING) for name in embedding_copies(frozen))
    for names in _aliases(frozen):
        shapes = {name: full_shape(tensors[name]) for name in names}
        try:
            mapped = _map(shapes, (), True, structure, [names], extra=rules, depths=depths)
        except BlockError:
            found[names[0]] = None
        else:
            found.update(mapped)
    return found


def map_names(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rules: Iterable[Rule | dict] | None = None,
    strict: bool = True,
    heads: HeadCounts | None = None,
    family: str | None = None,
    transposed: Iterable[str] = (),
    aliases: Iterable[list[str]] | None = None,
    copies: Iterable[str] = (),
) -> BlockMap:
    """:func:`map_blocks` for names and shapes alone.

    Args:
        shapes: name -> shape, in the model's order.
        rules, strict, family: as for :func:`map_blocks`.
        heads: the head counts of fused and per-head weights; None: not known.
        transposed: names of weights whose output axis is the last one (Conv1D).
        aliases: the names of each parameter; a parameter is mapped once, under its first name, and as an embedding if
            any of its names is one. By default every name is a parameter of its own.
        copies: names of output layers tied to another pipeline stage's embedding; they are mapped as embeddings.

    Raises:
        UnmappedParameterError, BlockError: as for :func:`map_blocks`.
    """
    own, structure = user_rules(rules), Structure({"": Context(family, heads)}, transposed=frozenset(transposed))
    same = [[name] for name in shapes] if aliases is None else list(aliases)
    depths = depths_of(shapes, own, structure, same, shapes)
    return _map(shapes, own, strict, structure, same, copies, depths=depths)


def map_named(
    named: Iterable[tuple[str, torch.Tensor]],
    *,
    rules: Iterable[Rule | dict] | None = None,
    heads: HeadCounts | None = None,
    elsewhere: Iterable[str] | None = None,
) -> BlockMap:
    """:func:`map_names` for named parameters, which are bound to the map; frozen ones become its ``frozen``."""
    named, own, structure = list(named), user_rules(rules), Structure({"": Context(None, heads)})
    trained, frozen = ([(name, p) for name, p in named if p.requires_grad is wanted] for wanted in (True, False))
    shapes, aliases = {name: full_shape(p) for name, p in trained}, [[name] for name, _ in trained]
    depths = depths_of(shapes, own, structure, aliases, [*(name for name, _ in named), *(elsewhere or ())])
    off, whole = [name for name, _ in frozen], elsewhere is None
    block_map = _map(shapes, own, True, structure, aliases, depths=depths, whole=whole, frozen=off)
    block_map.frozen = _frozen_layouts(frozen, own, structure, depths)
    block_map.bind(named)
    return block_map


def _map(
    shapes: Mapping[str, tuple[int, ...]],
    own: tuple[Rule, ...],
    strict: bool,
    structure: Structure,
    aliases: Sequence[list[str]],
    copies: Iterable[str] = (),
    extra: tuple[Rule, ...] = (),
    depths: Depths | None = None,
    whole: bool = True,
    frozen: Iterable[str] = (),
) -> BlockMap:
    """Maps every alias group. Of a whole model, each of the ``own`` rules must match something, be it ``frozen``; ``extra``
    ones need not."""
    copies = list(copies)
    given, own = own, own + extra + tuple(Rule(name, BlockType.EMBEDDING) for name in copies)
    used: set[Rule] = set()
    found = [alias_layout(names, shapes, own, structure, depths, used) for names in aliases]
    unmapped = [(names[0], shapes[names[0]]) for names, layout in zip(aliases, found) if layout is None]
    layouts = [layout or _base_layout(names[0], shapes[names[0]]) for names, layout in zip(aliases, found)]
    layouts = with_rates(layouts, aliases, own, copies, depths, used)
    off = [plain_name(name) for name in frozen]
    unused = [rule for rule in given if rule not in used and not any(matches(rule.match, name) for name in off)]
    if whole and unused:
        raise _unused_error(unused[0], shapes, depths)
    if unmapped and strict:
        raise _unmapped_error(unmapped, layouts, own + family_rules(structure.contexts[""].family))
    heads = structure.contexts[""].heads
    found_map = BlockMap(layouts, heads, (name for name, _ in unmapped), own_blocks=own_blocks(own))
    found_map.unused_rules = tuple(unused)
    return found_map


def _base_layout(name: str, shape: tuple[int, ...]) -> ParamLayout:
    return ParamLayout(name, shape, (Piece(BlockType.NORM, shape[0] if shape else 1),), kind=MATRIX)


def _unused_error(rule: Rule, names: Iterable[str], depths: Depths | None) -> BlockError:
    close = difflib.get_close_matches(rule.match.strip("*."), names, n=1, cutoff=0.0)
    layers = "" if rule.layers is None else f" in the layers {rule.layers.text!r} (layers: {depths})"
    return BlockError(
        f"block rule {rule.match!r} matches no trainable parameter{layers} (nearest name: {close[0] if close else 'none'}), "
        f"or only those of a rule before it; correct it or remove it"
    )


def _unmapped_error(
    unmapped: Sequence[tuple[str, tuple[int, ...]]], layouts: Iterable[ParamLayout], table: tuple[Rule, ...]
) -> UnmappedParameterError:
    unknown = {name for name, _ in unmapped}
    plain = [(plain_name(name), shape) for name, shape in unmapped]
    known = {plain_name(layout.name): layout for layout in layouts if layout.name not in unknown}
    rules = suggested_rules(plain, known)
    where = unmapped[0][0].rpartition(".")[0].rpartition(".")[2] or unmapped[0][0]
    nearest = difflib.get_close_matches("*." + where, [rule.match for rule in table], n=1, cutoff=0.0)[0]
    return UnmappedParameterError(advice(unmapped, rules, nearest), rules)
