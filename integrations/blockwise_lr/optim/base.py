"""What the blockwise optimizers share: named parameters or flat shards, plans, learning rates per block type."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import BlockError, BlockMap, BlockType, ParamLayout
from ..blocks.block_map import UnmappedParameterError, full_shape, map_named
from ..blocks.layout import Rate
from ..blocks.presets import PRESETS, lr_ratios, preset_of
from ..blocks.rules import Rule
from ..collective.agreement import same_on_all_ranks
from ..collective.errors import is_rank_zero
from ..kernels import Kernel, StepValues, Work, kernel_for
from ..kernels.huge_pages import use_huge_pages
from ..plan.dtensor import dtensor_shards, groups_of, local
from ..plan.shards import Fragment, ShardMap
from ..plan.step_plan import StepPlan
from ..rules.base import State, UpdateRule
from ..rules.options import OptimizerOptions, own_of_rules
from ..rules.param_groups import advance, block_lrs, change_ratios, class_decay, group_lr, lower, rates_by_block
from .attachment import Attachment
from .clipping import BlockClip
from .groups import listed, names_of, settings_of, tensors_of
from .replaced import has_strangers, replacements
from .saving import Saving
from .tensors import empty_moment, is_row, real_layout, refuse_unlike, row, row_numel, write_back

# what copies and pickles of an optimizer keep besides torch's own
_KEPT = (
    "block_map",
    "_map_given",
    "kernel_name",
    "accept_mismatch",
    "ratio_fade_steps",
    "initial_settings",
    "_block_rules",
    "own_blocks",
    "places",
    "bias_segments",
    "block_clip",
    "grad_power",
)

logger = logging.getLogger(__name__)

_holding: ContextVar[bool] = ContextVar("holding_steps", default=False)


def _refuse_muons(preset: str | None, options: OptimizerOptions) -> None:
    """Ratios over the learning rate of Muon's matrices mean nothing for other optimizers."""
    if preset is not None and PRESETS[preset].is_muons and getattr(options, "matrix_scale", None) != "original":
        raise BlockError(
            f"the preset {preset} of block_lr_ratios is over the learning rate of Muon's matrices; use BlockwiseMuon with "
            f"matrix_scale 'original', or another preset"
        )


def _by_names(named: Sequence[tuple[str, torch.Tensor]], rules: Sequence[Rule]) -> BlockMap:
    """A map of parameters whose modules are not known."""
    try:
        return map_named(named, rules=rules)
    except UnmappedParameterError as error:
        hint = "block_map=map_blocks(model) also reads what the modules are, and may know; by the names alone, "
        raise UnmappedParameterError(f"{hint}{error}", error.rules) from None


def _to_power(grad: torch.Tensor | None, power: float) -> None:
    """sign(g) |g|^power, in place."""
    if grad is not None:
        grad.copy_(grad.sign() * grad.abs().pow(power))


class Due(NamedTuple):
    """A tensor that is to be stepped, and what by."""

    tensor: torch.Tensor
    plan: StepPlan
    values: StepValues


class BlockwiseOptimizer(Saving):
    """Base of all blockwise optimizers: steps the tensors of its param groups by an update rule.

    Copies (``copy.deepcopy``) and pickles of model and optimizer together go on as the original; where a framework has
    attached its shards they are refused.

    Args:
        params: as torch.optim takes them; see the classes' own documentation.
        positional: values of the rule's ``positional`` options.
        block_map: from :func:`blockwise_lr.map_blocks`; made from the parameters' names otherwise.
        options: the rule's options by name.

    Raises:
        TypeError: one tensor for params, or more positional values than the rule has, as torch.optim.
        BlockError: an unknown option, a value out of range, an unknown block type, or a parameter that is not mapped.
    """

    rule: ClassVar[UpdateRule]
    Options: ClassVar[type[OptimizerOptions]]
    own_blocks: Mapping[str, float | None] = MappingProxyType({})  # the user's, and the ratios that their rules state
    places: Sequence[Sequence[str | None]] = ()  # per param group, its parameters' names; as block_clip
    block_clip: Mapping[str, float | str] = {}  # of states of 0.3 and before, which do not say
    grad_power: float = 1.0
    block_schedule: Any = None  # an adapter's, whose scheduler asks for it
    _idle_steps: int | None = 0  # in which no parameter had a gradient; None: not counted
    matrix_device: torch.device | None = None  # an adapter's; see Attachment

    @staticmethod
    @contextmanager
    def holding_steps() -> Iterator[None]:
        """While a framework wraps an optimizer: step() does nothing, so that a trial step neither counts nor decays.

        Holds for this thread; may be nested.
        """
        token = _holding.set(True)
        try:
            yield
        finally:
            _holding.reset(token)

    def __init__(
        self, params: Iterable[Any], *positional: Any, block_map: BlockMap | None = None, **options: Any
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters; pass model.named_parameters(), block_map=map_blocks(model)"
            )
        if isinstance(params, torch.Tensor):
            raise TypeError(
                "params must be an iterable of parameters, of (name, parameter) pairs or of param groups, and is "
                "one tensor"
            )
        names = self.rule.positional
        if len(positional) > len(names) or set(names[: len(positional)]) & options.keys():
            raise TypeError(
                f"{type(self).__name__} takes params, {', '.join(names)} by position and everything else by name, each once"
            )
        if "block_strict" in options:
            raise TypeError(
                "block_strict is for ds_configs and Trainer arguments; pass block_map=map_blocks(model, strict=...)"
            )
        options = {**dict(zip(names, positional)), **options}
        params = [listed(entry) for entry in params]
        groups = groups_of(tensors_of(params))  # parameters of several ranks: what must be equal on them is compared
        same_on_all_ranks(
            groups,
            lambda: self._build(params, options, block_map),
            self._described,
            f"building {type(self).__name__}",
        )

    def _build(self, params: list[Any], given: Mapping[str, Any], block_map: BlockMap | None) -> None:
        own = None if block_map is None else {**block_map.own_blocks, **own_of_rules(given.get("block_rules"))}
        options = self.rule.Options.checked(given, own=own, config=None if block_map is None else block_map.config)
        self.own_blocks = own_of_rules(options.block_rules) if own is None else own
        _refuse_muons(preset_of(given.get("block_lr_ratios")), options)
        self.kernel_name, self.bias_segments = options.kernel, getattr(options, "bias_segments", None)
        self.accept_mismatch, self.ratio_fade_steps = options.accept_mismatch, options.ratio_fade_steps
        self._block_rules, self._map_given = options.block_rules, block_map is not None
        if block_map is not None:
            self.block_map = block_map
        self.rates_of_groups: Sequence[tuple[Rate, ...]] | None = None  # an adapter's, see Attachment
        self.block_clip, self.grad_power = options.block_clip, options.grad_power
        self.initial_settings: list[dict[str, Any]] = []
        self.places = []
        self._forget_tensors()
        self._set_saving()
        super().__init__(params, options.group_defaults())
        self._map(self.param_groups)
        self._warn_of_high_rates()

    def _warn_of_high_rates(self) -> None:
        """AdamW's learning rate as ``lr`` is the likeliest mistake with the paper's ratios: the FFN trains at six times it."""
        high = self.rule.highest_usual_lr
        for group in self.param_groups:
            lr, rate = float(group["lr"]), group_lr(group, Rate(BlockType.FFN.value))
            if rate > high and rate > lr and is_rank_zero():
                cure = f"give adamw_lr={lr:g} in place of lr" if self.Options.FOLLOWS_ADAMW else "give a lower lr"
                logger.warning(
                    f"{type(self).__name__}: lr {lr:g} trains ffn blocks at {rate:g}, above what one "
                    f"learning rate usually is ({high:g} at most); if {lr:g} is the rate of a run with one rate, {cure}"
                )
                return

    def _described(self) -> dict[str, Any]:
        """What must be equal on all ranks that share parameters."""
        return {**self.record().as_dict(), "version": None, "fingerprint": None}

    def _forget_tensors(self) -> None:
        self.shards: ShardMap | None = None
        self._plans: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._copies: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._placed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors whose memory has been seen to
        self._fragments: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._clip: BlockClip | None = None

    # ---- param groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim's; its own options are checked as the optimizer's are.

        Raises:
            BlockError: a bad option, a parameter that is not mapped, or a framework has attached its shards. Nothing has
                been added then.
        """
        if self.shards is not None and not self._shards_are_dtensors():
            raise BlockError(
                "param groups cannot be added once a framework has sharded the parameters; build the engine "
                "again with all of them"
            )
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        number = len(self.param_groups)
        said = self.rule.Options.checked_group(
            param_group,
            self.defaults["lr"],
            f"param group {number}: ",
            self.own_blocks,
            self.block_map.config if self._map_given else None,
        )
        # a group taken from another optimizer of ours knows whether its weight_decay was the user's own
        group = {"group_decay": "weight_decay" in said, **param_group, **said}
        if "min_lr" in said:
            group["block_min_lr"] = said["min_lr"]
        super().add_param_group(group)
        if self.initial_settings:  # after construction
            try:
                self._map(self.param_groups[number:])
            except BaseException:
                self.param_groups.pop()
                raise

    def _map(self, groups: Sequence[dict[str, Any]]) -> None:
        """Maps the parameters of new groups and takes note of their settings."""
        named = [(name, p) for group in groups for name, p in zip(names_of(group), group["params"])]
        if not self._map_given and not self.initial_settings:
            if any(name is None for name, _ in named):
                raise BlockError(
                    f"{type(self).__name__} needs to know which parameter is which; pass "
                    f"block_map=map_blocks(model), or model.named_parameters()"
                )
            self.block_map = _by_names([(str(name), p) for name, p in named], self._block_rules)
        else:
            self._complete_map(named)
        for name, p in ((self.block_map.require_name(p), p) for _, p in named if p.requires_grad):
            self._check_layout(name, p)
        self.places = [*self.places, *([self.block_map.name_of(p) for p in group["params"]] for group in groups)]
        self.initial_settings = [
            *self.initial_settings,
            *(settings_of(group, self.rule.Options.group_names()) for group in groups),
        ]
        self._attach_dtensors()
        self._note_record()

    def _complete_map(self, named: Sequence[tuple[str | None, torch.Tensor]]) -> None:
        """Finds the parameters in the map; what a later group brings beyond it is mapped by name."""
        known = self.block_map
        known.bind((name, p) for name, p in named if name is not None and known.name_of(p) is None)
        new = [(name, p) for name, p in named if known.name_of(p) is None and p.requires_grad]
        if new and (not self.initial_settings or any(name is None for name, _ in new)):
            name, p = new[0]
            raise BlockError(
                f"a parameter {name or ''} of shape {tuple(p.shape)} is in no block; it is not in the block_map, "
                f"so make the map from the model that holds it"
            )
        if new:
            added = [(str(name), p) for name, p in new]
            known.add(map_named(added, rules=self._block_rules, heads=known.heads, elsewhere=known))

    def _check_layout(self, name: str, tensor: torch.Tensor) -> None:
        """Refuses a parameter that is not as the map says, or cannot be stepped, before the first step."""
        if tensor.is_complex() and not self.rule.complex_as_pairs:
            raise BlockError(f"{name} is complex, for which {self.rule.title} is not defined; use BlockwiseAdamW")
        if math.prod(full_shape(tensor)) != self.block_map[name].numel:
            raise BlockError(
                f"{name} is of shape {tuple(full_shape(tensor))} and the block_map has it of shape "
                f"{self.block_map[name].shape}; make the map from the model that is trained"
            )
        self._plan(0, [Fragment(name, 0, 0, 0)], [self._layout_in(tensor, name)])

    def all_tensors(self) -> list[torch.Tensor]:
        """The tensors of all param groups, in the order in which state dicts number them."""
        return [tensor for group in self.param_groups for tensor in group["params"]]

    # ---- shards

    def attach_shards(self, shards: ShardMap) -> None:
        """Tells the optimizer that the tensors in its param groups are flat shards, and what lies in them.

        Args:
            shards: names in it must be in the block map, whose shapes are those of this rank's (tensor-parallel) slices.

        Raises:
            BlockError: a fragment of a parameter that is not mapped, or that does not fit it or the flat tensor.
        """
        for flat, fragments in shards.flats:
            self._check_fragments(row_numel(flat), fragments)
        self.shards, self._clip = shards, None
        self.saving = replace(self.saving, collective_load=True)
        self._fragments, self._plans = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for flat, fragments in shards.flats:
            self._fragments[flat] = list(fragments)
            self._plans[flat] = self._make_plan(flat, fragments)
        self._note_record()

    def attach(self, attachment: Attachment) -> None:
        """Takes over what a framework's adapter supplies once the framework has wrapped the optimizer.

        Raises:
            BlockError: as :meth:`attach_shards`.
        """
        if attachment.shards is not None:
            self.attach_shards(attachment.shards)
        self._idle_steps = None  # a framework's tensors may have no gradient on this rank
        self.saving = attachment.saving
        self.rates_of_groups, self.matrix_device = attachment.rates_of_groups, attachment.matrix_device
        self._note_record()

    def _check_fragments(self, size: int, fragments: Iterable[Fragment]) -> None:
        end = 0
        for fragment in sorted(fragments, key=lambda fragment: fragment.offset):
            layout = self.block_map.get(fragment.name)
            if layout is None:
                raise BlockError(f"a shard holds {fragment.name}, which the block map does not know")
            if fragment.start < 0 or fragment.numel < 0 or fragment.start + fragment.numel > layout.numel:
                raise BlockError(
                    f"a shard holds elements {fragment.start} to {fragment.start + fragment.numel} of "
                    f"{fragment.name}, which has {layout.numel}"
                )
            if fragment.offset < end or fragment.offset + fragment.numel > size:
                raise BlockError(
                    f"{fragment.name} is said to lie at {fragment.offset} to "
                    f"{fragment.offset + fragment.numel} of a shard of {size} elements, the first {end} of "
                    f"which are taken"
                )
            end = fragment.offset + fragment.numel

    @property
    def attached_shards(self) -> ShardMap:
        """What was attached.

        Raises:
            BlockError: no framework has attached shards.
        """
        if self.shards is None:
            raise BlockError(
                f"no shards are attached to this {type(self).__name__}; call attach with those that the framework has made"
            )
        return self.shards

    def _shards_are_dtensors(self) -> bool:
        return self.shards is not None and any(isinstance(flat, DTensor) for flat, _ in self.shards.flats)

    def _attach_dtensors(self) -> None:
        trained = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
        sharded = dtensor_shards(trained, self.block_map.require_name)
        if sharded is not None:
            self.attach_shards(sharded)

    def take_replaced(self) -> None:
        """Takes over the DTensors that a framework has put in the places of the parameters (:mod:`.replaced`).

        Collective where there are any, as building was; each step and each load asks.

        Raises:
            BlockError: they do not fit the places, the optimizer has a state of the parameters before, or ranks differ.
        """
        if not has_strangers(self.param_groups, self.places, self.block_map):
            return
        groups = groups_of(self.all_tensors())
        same_on_all_ranks(groups, self._take_replaced, self._described, f"sharding what {type(self).__name__} trains")

    def _take_replaced(self) -> None:
        found = replacements(self.param_groups, self.places, self.block_map)
        if self.state:
            raise BlockError(
                "the parameters were sharded after the optimizer had made or loaded a state; shard the model first, as "
                "accelerator.prepare(model, optimizer) does, and step or load then"
            )
        self.block_map.bind(found)
        self._forget_tensors()
        self._attach_dtensors()
        self._note_record()

    def plan_of(self, tensor: torch.Tensor) -> StepPlan:
        """The plan of one of the optimizer's tensors: a flat shard, or a whole parameter.

        Raises:
            BlockError: shards are attached and the tensor is none of them.
        """
        plan = self._plans.get(tensor)
        if plan is None:
            plan = self._plans[tensor] = self._make_plan(tensor, self.fragments_of(tensor))
        return plan

    def fragments_of(self, tensor: torch.Tensor) -> list[Fragment]:
        """What lies in one of the optimizer's tensors; raises as :meth:`plan_of`."""
        found = self._fragments.get(tensor)
        if found is not None:
            return found
        name = self.block_map.name_of(tensor)
        if name is None:
            raise BlockError(
                f"the optimizer was given a tensor of shape {tuple(tensor.shape)} that is neither a parameter of "
                f"the block map nor an attached shard; add it with add_param_group, by name"
            )
        return [Fragment(name, 0, row_numel(tensor), 0)]

    def _make_plan(self, tensor: torch.Tensor, fragments: Iterable[Fragment]) -> StepPlan:
        fragments = list(fragments)
        return self._plan(row_numel(tensor), fragments, [self._layout_in(tensor, f.name) for f in fragments])

    def layout_of(self, name: str) -> ParamLayout:
        """The layout the step uses for a parameter: its units are the rule's segments."""
        return self.rule.segments(self.block_map[name], self.bias_segments)

    def _layout_in(self, tensor: torch.Tensor, name: str) -> ParamLayout:
        layout = self.layout_of(name)
        return real_layout(layout) if tensor.is_complex() else layout

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        raise NotImplementedError

    def write_copies(self, copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """From now on every step also writes the updated parameters, rounded to bfloat16, in the same pass.

        Args:
            copies: the optimizer's tensor (a float32 master or shard) -> bfloat16 tensor of its shape and device.

        Raises:
            BlockError: a tensor that is not the optimizer's, or a copy that does not fit it.
        """
        mine = {id(p) for p in self.all_tensors()}
        for tensor, copy in copies.items():
            if id(tensor) not in mine:
                raise BlockError(
                    f"write_copies was given a tensor of shape {tuple(tensor.shape)} that is not in this "
                    f"optimizer's param groups; use the tensors that it steps"
                )
            if (
                copy.dtype != torch.bfloat16
                or copy.shape != tensor.shape
                or copy.device != tensor.device
                or not (is_row(copy) and is_row(tensor))
            ):
                raise BlockError(
                    f"the copy of a parameter of shape {tuple(tensor.shape)} on {tensor.device} must be a "
                    f"bfloat16 tensor of that shape there, both contiguous, not {copy.dtype} of "
                    f"{tuple(copy.shape)} on {copy.device}"
                )
        self._copies = WeakIdKeyDictionary({tensor: row(copy) for tensor, copy in copies.items()})

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What :meth:`write_copies` set for a tensor, as one row."""
        return self._copies.get(tensor)

    def describe(self) -> str:
        """One line for a log: kernel, size of the step plans, and per block type this rank's elements and its peak rate."""
        tensors = [p for p in self.all_tensors() if p.requires_grad]
        kernels = dict.fromkeys(self._kernel(p).name for p in tensors)
        plans = sum(self.plan_of(p).nbytes for p in tensors)
        rates = self.block_map.rate_numel(self._held())
        numels: dict[str, int] = {}
        for rate, numel in rates.items():
            numels[rate.block] = numels.get(rate.block, 0) + numel
        peaks: dict[str, set[tuple[float, float]]] = {block: set() for block in numels}
        for of in self.initial_settings:
            for block, ends in rates_by_block(rates, partial(_peak, of)).items():
                peaks[block].add(ends)
        said = [
            f"{block} {numel:,} at {' and '.join(map(_shown, sorted(peaks[block])))}" for block, numel in numels.items()
        ]
        return (
            f"{type(self).__name__} ({', '.join(kernels) or 'no'} kernel, {plans / 1024:,.0f} KiB of step plans), elements and "
            f"peak learning rates: {', '.join(said)}"
        )

    def _held(self) -> set[str] | None:
        """The parameters in the param groups, where these hold parameters and not all of the model's; None: all."""
        if self.shards is not None:
            return None
        names = {self.block_map.name_of(p) for p in self.all_tensors()}
        return None if None in names else {str(name) for name in names}

    # ---- learning rates

    @property
    def built_lrs(self) -> list[Any] | None:
        """The base learning rate each param group was built with, once a state was loaded over it; None before."""
        return [settings["lr"] for settings in self.initial_settings] if self.was_loaded else None

    def block_lrs(self) -> list[dict[str, float]]:
        """Per param group: block type, or own block -> its learning rate now, for those of the model. Where rules scale it
        differently (by layer), its highest, and its lowest as ``<block>.lowest``."""
        rates = self.block_map.rate_numel(self._held())
        return [block_lrs(group, rates) for group in self.param_groups]

    @property
    def block_lr_ratios(self) -> dict[BlockType | str, float]:
        """The ratios that hold now, of block types and own blocks; where param groups differ, those of the first."""
        types = {block.value: block for block in BlockType}
        return {types.get(block, block): ratio for block, ratio in self.param_groups[0]["block_lr_ratios"].items()}

    def set_block_lr_ratios(self, ratios: str | Mapping[str, Any]) -> None:
        """Changes the ratios of every param group from the next step on; a schedule that knows blocks follows at its next
        step. They are saved and loaded with the state, while the settings the optimizer was built with stay on record.

        Args:
            ratios: by block type or own block; those not named stay as they are. Or a preset's name, as for the option
                ``block_lr_ratios``: all change.

        Raises:
            BlockError: as the option; nothing has been changed then.
        """
        found = lr_ratios(ratios, self.own_blocks, self.block_map.config)
        new = {str(block): ratio for block, ratio in found.items()}
        is_partial = not isinstance(ratios, str) and "preset" not in ratios
        named = {str(block) for block in ratios} if is_partial else set(new)
        for group in self.param_groups:
            change_ratios(group, {**group["block_lr_ratios"], **{block: new[block] for block in named}})

    def lower_lrs(self, factor: float, steps: int) -> None:
        """Multiplies every rate by a factor in the next steps, whatever schedules say in the meantime; then it is gone. Saved
        and loaded with the state.

        Args:
            factor: above 0, up to 1.
            steps: how many; a later call replaces an earlier one.

        Raises:
            BlockError: a factor or a number of steps out of range.
        """
        if not 0 < factor <= 1 or steps < 1:
            raise BlockError(f"lower_lrs({factor!r}, {steps!r}): give a factor above 0, up to 1, and 1 step or more")
        taken = max((int(state["step"]) for state in self.state.values() if state), default=0)
        for group in self.param_groups:
            lower(group, factor, taken + steps)

    def _values(self, group: dict[str, Any], plan: StepPlan, step: int) -> StepValues:
        return StepValues(
            tuple(group_lr(group, of.rate) for of in plan.classes),
            tuple(class_decay(group, of) for of in plan.classes),
            self.rule.scalars(group, step),
        )

    # ---- the step

    @property
    def clip(self) -> BlockClip:
        """What clips gradients by block type; see the option block_clip."""
        if self._clip is None:
            shards = self.shards or ShardMap([])
            flats = [id(flat) for flat, _ in shards.flats]
            group_of, counted = dict(zip(flats, shards.groups)), dict(zip(flats, shards.counted))
            self._clip = BlockClip(
                self.block_clip,
                self.plan_of,
                lambda tensor: group_of.get(id(tensor)),
                [group for group in dict.fromkeys(shards.groups) if group is not None],
                lambda tensor: counted.get(id(tensor), True),
                self.param_groups,
            )
        return self._clip

    def init_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a tensor, made where it is not there yet: before the first step, or before a load."""
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for spec in self.rule.states:
                state[spec.name] = empty_moment(tensor) if spec.per == "element" else self._segment_state(tensor)
        return state

    def _segment_state(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros for the segments of a tensor."""
        raise NotImplementedError

    def state_numel(self, tensor: torch.Tensor) -> dict[State, int]:
        """Elements of each state that this rank holds for one of its tensors."""
        return self._state_numel(tensor, self.plan_of(tensor))

    def _state_numel(self, tensor: torch.Tensor, plan: StepPlan) -> dict[State, int]:
        return dict.fromkeys(self.rule.states, plan.numel)

    @torch._disable_dynamo  # kernels work on memory that dynamo does not see
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: evaluates the model again and returns the loss, as for torch.optim.

        Raises:
            BlockError: a tensor, gradient, state or rate that cannot be stepped; no tensor has been changed then.
        """
        if _holding.get():
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_replaced()
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not work:
            self._warn_of_idle_steps()
        due = [self._checked(group, p) for group, p in work]
        if self.block_clip:
            self.clip.apply([p for p, _, _ in due])
        if self.grad_power != 1:
            for p, _, _ in due:
                _to_power(p.grad, self.grad_power)
        for p, _, _ in due:
            self.init_state(p)["step"] += 1
            self._place(p)
        self._step(due)
        return loss

    def _warn_of_idle_steps(self) -> None:
        """Parameters that were replaced in the model after the optimizer was built never get a gradient. No error, for a
        schedule may be looked at by steps without any."""
        if self.state or self._idle_steps is None:
            return
        self._idle_steps += 1
        if self._idle_steps > 1:
            self._idle_steps = None
            if is_rank_zero():
                logger.warning(
                    f"{type(self).__name__} takes its second step and none of its parameters has ever had a gradient: nothing "
                    f"is trained. If the model trains, it trains other ones; build the optimizer after what replaces them "
                    f"(fully_shard, to_empty)"
                )

    def _checked(self, group: dict[str, Any], p: torch.Tensor) -> Due:
        """A tensor's plan and the numbers of its next step, once all that it will read and write is seen to be right."""
        name = self.block_map.name_of(p)
        if name is not None and name not in self.block_map:  # it was frozen when the optimizer was built
            self.block_map.unfreeze(name)
            self._check_layout(name, p)
            self._attach_dtensors()
            self._note_record()
        plan = self.plan_of(p)
        state = self.state.get(p, {})
        refuse_unlike(name or "a shard", p, state, plan.numel, self._state_numel(p, plan))
        step = int(state["step"]) + 1 if state else 1
        advance(group, step)
        return Due(p, plan, self._values(group, plan, step))

    def _place(self, tensor: torch.Tensor) -> None:
        if not tensor.is_cuda and tensor not in self._placed:
            self._placed[tensor] = True
            state = self.state[tensor]
            use_huge_pages(*map(local, (tensor, tensor.grad, *(state[spec.name] for spec in self.rule.states))))

    def _step(self, due: Sequence[Due]) -> None:
        raise NotImplementedError

    def _step_rows(
        self,
        due: Sequence[Due],
        moments: Mapping[torch.Tensor, torch.Tensor] | None = None,
        *,
        presummed: bool = False,
    ) -> None:
        """Steps tensors, all of a device by one call of its kernel. What is no row is stepped alone, as a copy that is
        written back.

        Args:
            moments: each tensor's segment state as kernels take it, of rules that have one.
        """
        together: dict[Kernel, list[Work]] = {}
        for p, plan, values in due:
            assert p.grad is not None  # only tensors with a gradient are stepped
            kept = (p, *(self.state[p][spec.name] for spec in self.rule.element_states))
            param, *states = map(row, kept)
            out, slots = self.copy_of(p) if self._copies else None, None if moments is None else moments[p]
            made = Work(param, row(p.grad), states, plan, values, out, slots)
            kernel = self._kernel(p)
            if all(map(is_row, kept)):
                together.setdefault(kernel, []).append(made)
                continue
            kernel.step(self.rule, [made], presummed=presummed)
            for original, stepped in zip(kept, (param, *states)):
                if not is_row(original):
                    write_back(original, stepped)
        for kernel, works in together.items():
            kernel.step(self.rule, works, presummed=presummed)

    def _kernel(self, tensor: torch.Tensor) -> Kernel:
        return kernel_for(tensor.device, self.kernel_name)

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        if self.shards is not None and not self._shards_are_dtensors():
            raise TypeError(
                f"{type(self).__name__} cannot be copied or pickled while a framework's shards are attached to it; "
                f"save with the framework's checkpoints"
            )
        names = [[self.block_map.name_of(p) for p in group["params"]] for group in self.param_groups]
        return {**super().__getstate__(), "blockwise": {key: getattr(self, key) for key in _KEPT}, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        kept, names = state.pop("blockwise", None), state.pop("names", ())
        if kept is None:
            return super().__setstate__(state)
        self.__dict__.update(kept)
        self._forget_tensors()
        super().__setstate__(state)
        for group, of_group in zip(self.param_groups, names):
            self.block_map.bind(zip(of_group, group["params"]))
        self._set_saving()
        self._attach_dtensors()
        self._note_record()

    def __repr__(self) -> str:
        hidden = {
            key: [group.pop(key, None) for group in self.param_groups] for key in (self.RECORD_KEY, "param_names")
        }
        try:
            return super().__repr__()
        finally:
            for key, values in hidden.items():
                for group, value in zip(self.param_groups, values):
                    if value is not None:
                        group[key] = value


def _peak(settings: Mapping[str, Any], rate: Rate) -> float:
    return settings["lr"] * settings["block_lr_ratios"][rate.block] * rate.scale


def _shown(ends: tuple[float, float]) -> str:
    lowest, highest = ends
    return f"{lowest:.3g} to {highest:.3g}" if lowest < highest else f"{highest:.3g}"
