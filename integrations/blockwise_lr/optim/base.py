"""What the blockwise optimizers share: named parameters or flat shards, plans, learning rates per block type."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..blocks import BlockError, BlockMap, ParamLayout, map_names
from ..blocks.block_map import full_shape
from ..checkpoint.moments import spread
from ..checkpoint.record import (ELEMENTS, GROUP_SETTINGS, KEY, SEGMENTS, Record, checked_accepts, in_parameters,
                                 plain_layouts)
from ..checkpoint.restore import prepared
from ..kernels import KERNELS, Kernel, StepValues, kernel_for
from ..kernels.huge_pages import use_huge_pages
from .dtensor import dtensor_shards, local
from .plan import StepPlan
from .settings import advance_fade, checked_fade, class_decay, group_lr
from .shards import Fragment, ShardMap


class BlockwiseOptimizer(torch.optim.Optimizer):
    """Base of BlockwiseAdamW and BlockwiseAdamMini; see there for the arguments."""

    _held = False

    @classmethod
    @contextmanager
    def holding_steps(cls) -> Iterator[None]:
        """While a framework wraps an optimizer: step() does nothing, so that a trial step neither counts nor decays."""
        BlockwiseOptimizer._held = True
        try:
            yield
        finally:
            BlockwiseOptimizer._held = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, block_map: BlockMap | None,
                 block_rules: Iterable[dict] | None, kernel: str, accept_mismatch: Iterable[str],
                 ratio_fade_steps: int) -> None:
        groups = list(params)
        if groups and isinstance(groups[0], dict):
            # A weight_decay on a user's own group is theirs to keep; torch would fill in the default where it is absent.
            groups = [{**group, "group_decay": "weight_decay" in group} for group in groups]
        super().__init__(groups, defaults)
        self.kernel_name = kernel
        if kernel not in KERNELS:
            raise BlockError(f"unknown kernel {kernel!r}; use one of {', '.join(KERNELS)}")
        self.block_map = block_map if block_map is not None else self._map_by_name(block_rules)
        self.shards: ShardMap | None = None
        self._plans: dict[int, StepPlan] = {}
        self._copies: dict[int, torch.Tensor] = {}
        self._placed: set[int] = set()  # ids of tensors whose memory has been seen to
        self._fragments: dict[int, list[Fragment]] = {}
        self._check_all_mapped()
        self._set_saving()
        sharded = dtensor_shards((p for group in self.param_groups for p in group["params"] if p.requires_grad),
                                 self.block_map.name_of)
        if sharded is not None:
            self.attach_shards(sharded)
        self.accept_mismatch = checked_accepts(accept_mismatch)
        self.ratio_fade_steps = checked_fade(ratio_fade_steps)

    def _set_saving(self) -> None:
        """How states are saved and loaded, as frameworks' adapters change it."""
        self.initial_settings = [_settings(group) for group in self.param_groups]
        self.recorded_map = self.block_map  # what the record shows; of the whole model where this rank has a part
        self.row_parts = 1  # in how many segments rows that tensor-parallel ranks hold parts of are cut
        self.loaded_record: Record | None = None  # that of the last loaded state; None where it had none
        self.element_state = False  # saved second moments are spread over elements
        self.step_in_groups = False  # param groups are saved with the step count too
        self.states_apart = False  # the framework saves and loads the states' tensors itself; only steps come with groups
        self.loads_together = False  # all ranks load at the same time, and hear of each other's errors
        self.to_accept: Callable[[Sequence[str]], str] = in_parameters  # how a user accepts differences of such names

    # ---- what is mapped to what

    def _map_by_name(self, rules: Iterable[dict] | None) -> BlockMap:
        named = [(name, p) for group in self.param_groups for name, p in zip(group.get("param_names", ()),
                                                                             group["params"])]
        if not named:
            raise BlockError(f"{type(self).__name__} needs to know which parameter is which; pass "
                             f"model.named_parameters(), or block_map=map_blocks(model)")
        block_map = map_names({name: full_shape(p) for name, p in named if p.requires_grad}, rules=rules)
        block_map.bind(named)
        return block_map

    def _check_all_mapped(self) -> None:
        for group in self.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for name, p in zip(names, group["params"]):
                if p.requires_grad and self.block_map.name_of(p) is None:
                    if name in self.block_map:
                        self.block_map.bind([(name, p)])
                        continue
                    raise BlockError(f"a parameter {name or ''} of shape {tuple(p.shape)} is in no block; it is not in "
                                     f"the block_map, so make the map from the model that holds it")

    def attach_shards(self, shards: ShardMap) -> None:
        """Tells the optimizer that the tensors in its param groups are flat shards, and what lies in them.

        Args:
            shards: names in it must be in the block map, whose shapes are those of this rank's (tensor-parallel) slices.

        Raises:
            BlockError: a fragment of a parameter that is not mapped, or that does not fit it.
        """
        for _, fragments in shards.flats:
            for fragment in fragments:
                layout = self.block_map.get(fragment.name)
                if layout is None:
                    raise BlockError(f"a shard holds {fragment.name}, which the block map does not know")
                if fragment.start < 0 or fragment.start + fragment.numel > layout.numel:
                    raise BlockError(f"a shard holds elements {fragment.start} to {fragment.start + fragment.numel} of "
                                     f"{fragment.name}, which has {layout.numel}")
        self.shards = shards
        self.loads_together = True
        self._fragments = {id(flat): list(fragments) for flat, fragments in shards.flats}
        self._plans = {id(flat): self._make_plan(flat, fragments) for flat, fragments in shards.flats}

    def all_tensors(self) -> list[torch.Tensor]:
        """The tensors of all param groups, in the order in which state dicts number them."""
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def plan_of(self, tensor: torch.Tensor) -> StepPlan:
        """The plan of one of the optimizer's tensors: a flat shard, or a whole parameter.

        Raises:
            BlockError: shards are attached and the tensor is none of them.
        """
        plan = self._plans.get(id(tensor))
        if plan is None:
            plan = self._plans[id(tensor)] = self._make_plan(tensor, self.fragments_of(tensor))
        return plan

    def fragments_of(self, tensor: torch.Tensor) -> list[Fragment]:
        """What lies in one of the optimizer's tensors; raises as :meth:`plan_of`."""
        if id(tensor) in self._fragments:
            return self._fragments[id(tensor)]
        name = self.block_map.name_of(tensor)
        if name is None:
            raise BlockError(f"the optimizer was given a tensor of shape {tuple(tensor.shape)} that is neither a "
                             f"parameter of the block map nor an attached shard; call attach_shards first")
        return [Fragment(name, 0, tensor.numel(), 0)]

    def _make_plan(self, tensor: torch.Tensor, fragments: Iterable[Fragment]) -> StepPlan:
        fragments = list(fragments)
        return self._plan(local(tensor).numel(), fragments, [self.layout_of(fragment.name) for fragment in fragments])

    def layout_of(self, name: str) -> ParamLayout:
        """The layout the step uses for a parameter."""
        return self.block_map[name]

    def _plan(self, numel: int, fragments: list[Fragment], layouts: list[ParamLayout]) -> StepPlan:
        raise NotImplementedError

    def write_copies(self, copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """From now on every step also writes the updated parameters, rounded to bfloat16, in the same pass.

        Args:
            copies: the optimizer's tensor (a float32 master or shard) -> bfloat16 tensor of its shape and device.

        Raises:
            BlockError: a tensor that is not the optimizer's, or a copy that does not fit it.
        """
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        for tensor, copy in copies.items():
            if id(tensor) not in mine:
                raise BlockError(f"write_copies was given a tensor of shape {tuple(tensor.shape)} that is not in this "
                                 f"optimizer's param groups; use the tensors that it steps")
            if copy.dtype != torch.bfloat16 or copy.shape != tensor.shape or copy.device != tensor.device:
                raise BlockError(f"the copy of a parameter of shape {tuple(tensor.shape)} on {tensor.device} must be a "
                                 f"bfloat16 tensor of that shape there, not {copy.dtype} of {tuple(copy.shape)} on "
                                 f"{copy.device}")
        self._copies = {id(tensor): flat(copy) for tensor, copy in copies.items()}

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What :meth:`write_copies` set for a tensor, as one row."""
        return self._copies.get(id(tensor))

    # ---- learning rates

    def block_lrs(self) -> list[dict[str, float]]:
        """Per param group: block type -> its learning rate now, for the block types of the model."""
        blocks = self.block_map.block_numel()
        return [{block.value: group_lr(group, block) for block in blocks} for group in self.param_groups]

    def _values(self, group: dict[str, Any], plan: StepPlan, step: int) -> StepValues:
        beta1, beta2 = group["betas"]
        return StepValues(tuple(group_lr(group, of.block) for of in plan.classes),
                          tuple(class_decay(group, of) for of in plan.classes), beta1, beta2, group["eps"], step)

    # ---- the step

    def init_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a tensor, made where it is not there yet: before the first step, or before a load."""
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = self._second_moment(tensor)
        return state

    def _second_moment(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One optimizer step.

        Args:
            closure: evaluates the model again and returns the loss, as for torch.optim.
        """
        if BlockwiseOptimizer._held:
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in tensors:
            self.init_state(p)["step"] += 1
            self._place(p)
            advance_fade(group, int(self.state[p]["step"]))
        self._step([(p, self._values(group, self.plan_of(p), int(self.state[p]["step"]))) for group, p in tensors])
        return loss

    def _place(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._placed:
            self._placed.add(id(tensor))
            state = self.state[tensor]
            use_huge_pages(*map(local, (tensor, tensor.grad, state["exp_avg"], state["exp_avg_sq"])))

    def _step(self, work: list[tuple[torch.Tensor, StepValues]]) -> None:
        raise NotImplementedError

    # ---- saving and loading

    bias_segments: str | None = None  # Adam-mini's setting

    @property
    def segment_plans(self) -> bool:
        """Whether exp_avg_sq has one value per segment of the plan, and not one per element."""
        return False

    def record(self) -> Record:
        """Where a state saved now comes from; it lies in every param group of a state dict."""
        from .. import __version__

        form = SEGMENTS if self.segment_plans and not self.element_state else ELEMENTS
        return Record(type(self).__name__, __version__, self.recorded_map.fingerprint(),
                      plain_layouts(self.recorded_map), self.initial_settings, self.bias_segments, form, self.row_parts)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a record of its origin. Where shards are saved in formats that know only states of the
        parameters' shape, second moments are spread over their elements (on the CPU, 4 bytes an element)."""
        saved = super().state_dict()
        added: dict[str, Any] = {KEY: self.record().as_dict()}
        if self.step_in_groups:
            added["step"] = max((int(state["step"]) for state in saved["state"].values()), default=0)
        for group in saved["param_groups"]:  # frameworks pick and reorder groups; pickles hold the record once
            group.update(added)
        if self.segment_plans and self.element_state and not self.states_apart:
            tensors = self.all_tensors()
            for index, state in saved["state"].items():
                elements = spread(state["exp_avg_sq"], self.plan_of(tensors[index]))
                saved["state"][index] = {**state, "exp_avg_sq": elements.view_as(tensors[index])}
        return saved

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state saved by a blockwise optimizer or, where ``accept_mismatch`` says so, by any AdamW.

        With attached shards all ranks must call it at the same time.

        Raises:
            MismatchError: it contradicts this optimizer's settings or model in what ``accept_mismatch`` does not name.
            CheckpointError: it does not fit these tensors, or is of a newer format. Nothing has been loaded then.
        """
        ready, self.loaded_record = prepared(self, state_dict)
        kept = dict(self.state) if self.states_apart else {}
        super().load_state_dict(ready)
        self.state.update(kept)
        self._placed.clear()  # the moments may lie elsewhere now
        tensors = self.all_tensors()
        for position, state in ready["state"].items():
            mine = self.init_state(tensors[position])
            mine["step"] = state["step"].clone()  # DeepSpeed's loaders share one tensor between several states
            if self.segment_plans and not self.states_apart:  # torch has cast it to the parameter's dtype
                mine["exp_avg_sq"] = state["exp_avg_sq"].to(tensors[position].device, torch.float32, copy=True)

    def _kernel(self, tensor: torch.Tensor) -> Kernel:
        return kernel_for(tensor.device, self.kernel_name)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's settings as they are built, which schedulers change later on."""
    found = {key: group[key] for key in GROUP_SETTINGS}
    return {**found, "lr": float(group["lr"])}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or this rank's shard of a DTensor, as one row of elements, sharing its memory.

    Raises:
        BlockError: it is not contiguous; a copy would not be stepped.
    """
    tensor = local(tensor)
    if not tensor.is_contiguous():
        raise BlockError(f"a parameter of shape {tuple(tensor.shape)} is not contiguous in memory; "
                         f"make it so with p.data = p.data.contiguous() before building the optimizer")
    return tensor.view(-1)
