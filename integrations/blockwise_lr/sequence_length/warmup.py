"""A model that trains on short sequences first: its arguments are cut before its forward pass, in training mode only."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..blocks.types import BlockError
from .cutting import Cutter, map_tensors
from .schedule import LengthSchedule, WarmupOptions

log = logging.getLogger("blockwise_lr")

_ATTRIBUTE = "blockwise_sequence_length"  # of a module or an engine: its warmup


class SequenceLengthWarmup:
    """Cuts what a model is called with to the length of the step, while the model is in training mode.

    Call :meth:`step` after each optimizer step, once for all micro batches of it, and save :meth:`state_dict`. A loss that
    is computed outside of the model needs labels of the same length: ``batch = warmup.cut(batch)`` before both.

    Args:
        module: the model, as it is called: wrapped in DDP, compiled, or plain.
        options: those of :class:`~blockwise_lr.sequence_length.WarmupOptions`: start, end, steps, pacing, ...

    Raises:
        BlockError: an unknown option or a bad value; the module has a warmup already.
    """

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        checked = WarmupOptions.checked(options, "sequence_length_warmup: ")
        self._set(module, LengthSchedule(checked))
        self._hook = module.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        log.info(self.schedule.describe())

    def _set(self, module: torch.nn.Module, schedule: LengthSchedule, inner: torch.nn.Module | None = None) -> None:
        if warmup_of(module) is not None:
            raise BlockError(
                f"this {type(module).__name__} has a sequence length warmup already; detach that one first"
            )
        self.schedule = schedule
        self.cutter = Cutter(schedule.options.dims, schedule.options.way)
        self.module = module
        self.steps_done = 0
        self._tokens_before, self._tokens_here = 0, 0
        self._names = _positional_names(inner or module)
        object.__setattr__(module, _ATTRIBUTE, self)

    @property
    def completed(self) -> int:
        """Optimizer steps that are done."""
        return self.steps_done

    @property
    def length(self) -> int:
        """Tokens per sequence of the step that comes next, or is under way."""
        return self.schedule.length(self.completed + 1)

    def step(self) -> None:
        """Says that an optimizer step is done."""
        self.steps_done += 1

    def cut(self, batch: Any) -> Any:
        """A batch (a mapping, or tensors in lists and tuples) cut to this step's length; tokens are not counted.

        Raises:
            BlockError: a tensor of which is not known how to cut it, packed sequences, or rows above the full length.
        """
        return map_tensors(batch, lambda named: self.cutter(named, self.length, self.schedule.full)[0])

    def detach(self) -> None:
        """Gives the model back as it was."""
        self._hook.remove()
        self._forget()

    def _forget(self) -> None:
        vars(self.module).pop(_ATTRIBUTE, None)

    # ---- tokens

    @property
    def replicas(self) -> int:
        """How many ranks are given the same tokens."""
        return 1

    def tokens(self) -> int:
        """Tokens trained on so far, on all ranks and before a resume. Collective where torch.distributed is in use."""
        here = self._tokens_here
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
            if device.type == "meta" or (device.type == "cpu" and dist.get_backend() == "nccl"):
                device = torch.device("cuda", torch.cuda.current_device())
            counted = torch.tensor(here, dtype=torch.int64, device=device)
            dist.all_reduce(counted)
            here = int(counted.item())
        return self._tokens_before + here // self.replicas

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Steps and tokens done, and the settings, which :meth:`load_state_dict` compares. Collective as :meth:`tokens`."""
        return {"steps": self.completed, "tokens": self.tokens(), "settings": settings(self.schedule.options)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was saved, with this warmup's own settings; logs those that differ.

        Raises:
            BlockError: it is no state of a sequence length warmup.
        """
        if not isinstance(state, Mapping) or not {"steps", "tokens", "settings"} <= state.keys():
            raise BlockError("this is no state of a sequence length warmup; load what its state_dict returned")
        self.steps_done = int(state["steps"])
        self._tokens_before, self._tokens_here = int(state["tokens"]), 0
        for name, now in settings(self.schedule.options).items():
            if state["settings"].get(name, now) != now:
                log.warning(
                    "the sequence length warmup goes on with %s = %s; the checkpoint had %s",
                    name,
                    now,
                    state["settings"][name],
                )

    # ---- the hook

    @torch._disable_dynamo  # lengths are numbers of Python's, which compiled code would be compiled for, step by step
    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._in_training():
            return None
        names = [*self._names[: len(args)], *map(str, range(len(self._names), len(args)))]
        cut = self.cut_and_count({**dict(zip(names, args)), **kwargs})
        return tuple(cut[name] for name in names), {name: cut[name] for name in kwargs}

    def cut_and_count(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Named tensors, cut, as the model is about to train on them."""
        cut, tokens = self.cutter(named, self.length, self.schedule.full)
        self._tokens_here += tokens if torch.is_grad_enabled() else 0
        return cut

    def _in_training(self) -> bool:
        return self.module.training


def warmup_of(module: Any) -> SequenceLengthWarmup | None:
    """The warmup of a module or an engine, or of what these wrap; None where there is none."""
    while module is not None:
        found = getattr(module, "__dict__", {}).get(_ATTRIBUTE)
        if found is not None:
            return found
        module = _inner(module)
    return None


def cut_of_trainer(trainer: Any) -> Callable[[Any], Any] | None:
    """What cuts the batches of a Hugging Face Trainer; None where neither its engine nor its model has a warmup."""
    found = warmup_of(getattr(trainer, "model_wrapped", None)) or warmup_of(getattr(trainer, "model", None))
    return None if found is None else found.cut


def settings(options: WarmupOptions) -> dict[str, Any]:
    """Options as plain values that every process writes alike."""
    found = options.model_dump()
    if not isinstance(options.pacing, str):
        found["pacing"] = "custom"
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _positional_names(module: torch.nn.Module) -> list[str]:
    """The names of a forward's positional parameters; those of ``*args`` have none."""
    forward: Callable[..., Any] = unwrapped(module).forward
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in inspect.signature(forward).parameters.items() if parameter.kind in kinds]


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DDP or a compiled module."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def _inner(module: Any) -> torch.nn.Module | None:
    if isinstance(module, (DistributedDataParallel, torch.nn.DataParallel)):
        return module.module
    modules = getattr(module, "__dict__", {}).get("_modules", {})
    return modules.get("_orig_mod")
