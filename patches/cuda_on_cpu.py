"""torch.cuda: what programs written for a GPU ask of it, answered by the CPU.

Streams, events and synchronization become nothing, the CUDA generator becomes the CPU's, ``device="cuda"`` and ``.cuda()``
mean the CPU, and ``torch.cuda.FloatTensor`` and its kin stay types. Opt-in, for tests and first steps without a GPU;
refuses where one is. Threads other than the one that applied it see torch's own factory functions.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .base import Patch, Undo
from .symbols import PatchError, Symbol

_CPU = torch.device("cpu")
_TENSOR_TYPES = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "LongTensor": torch.int64,
    "IntTensor": torch.int32,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}
_MEMORY = 1 << 34  # bytes that the stand-in device claims to have


def _nothing(*_: Any, **__: Any) -> None:
    return None


class Stream:
    """A stream whose work is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = _nothing

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """An event that is reached when it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``."""
        return (end.seconds - self.seconds) * 1e3


def _tensor_type(name: str, dtype: torch.dtype) -> type:
    """A type that builds CPU tensors of the dtype and whose instances they are."""

    class Meta(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.dtype == dtype

        def __call__(cls, *arguments: Any) -> torch.Tensor:
            if arguments and all(isinstance(size, int) for size in arguments):
                return torch.empty(arguments, dtype=dtype)
            return torch.tensor(arguments[0], dtype=dtype)

    return Meta(name, (), {})


def _redirected(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    return _CPU if isinstance(device, torch.device) and device.type == "cuda" else device


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites devices in calls of torch functions, pins no memory, and names CPU tensor types as CUDA's are named."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs["device"] = _redirected(kwargs["device"])
        kwargs.pop("pin_memory", None)  # there is no allocator of pinned memory, nor a need for one
        if func is torch.Tensor.to:
            args = tuple(map(_redirected, args))
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _redirections() -> dict[str, Any]:
    """What each attribute of torch.cuda becomes."""
    properties = collections.namedtuple("properties", "major minor name total_memory multi_processor_count")
    stream = Stream()
    return {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: _CPU,
        "set_device": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda call, **_: call(),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": _nothing,  # torch.manual_seed calls it, after seeding the CPU
        "get_device_properties": lambda *_: properties(9, 0, "cpu", _MEMORY, 1),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "cpu",
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "memory_stats": lambda *_: collections.defaultdict(int),
        "reset_peak_memory_stats": _nothing,
        **{
            name: lambda *_: 0
            for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
        },
        **{name: _tensor_type(name, dtype) for name, dtype in _TENSOR_TYPES.items()},
    }


def _leaving_generator(iterate: Callable[..., Any]) -> Callable[..., Any]:
    """A data loader draws a seed from the CPU's generator, which with a GPU is not the one that dropout draws from: here
    a run that is resumed, and so makes its loaders anew, would otherwise drop other elements than the first."""

    @functools.wraps(iterate)
    def iterate_and_restore(self: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return iterate(self)
        finally:
            torch.set_rng_state(state)

    return iterate_and_restore


def _install(undo: Undo, _: None) -> None:
    if torch.cuda.is_available():
        raise PatchError("patch 'cuda-on-cpu' stands in for a missing GPU, and this machine has one; leave it out")
    for name, value in _redirections().items():
        undo.set(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        undo.set(torch.cuda.random, name, getattr(torch.cuda, name))
    for name in ("range_push", "range_pop"):
        undo.set(torch.cuda.nvtx, name, _nothing)
    undo.set(torch.Tensor, "cuda", lambda self, *_, **__: self)
    undo.set(torch.Tensor, "record_stream", _nothing)
    undo.set(torch.Tensor, "pin_memory", lambda self, *_, **__: self)
    undo.set(torch.nn.Module, "cuda", lambda self, *_, **__: self)
    if hasattr(torch, "accelerator"):
        undo.set(torch.accelerator, "is_available", lambda *_, **__: False)
        undo.set(torch.accelerator, "current_accelerator", _nothing)
        undo.set(torch.accelerator, "synchronize", _nothing)
        if hasattr(torch.accelerator, "current_device_index"):
            undo.set(torch.accelerator, "current_device_index", lambda: 0)
    undo.set(torch.utils.data.DataLoader, "__iter__", _leaving_generator(torch.utils.data.DataLoader.__iter__))
    mode = CudaMeansCpu()
    mode.__enter__()
    undo.call(lambda: mode.__exit__(None, None, None))


PATCH = Patch(
    name="cuda-on-cpu",
    package="torch",
    versions=">=2.6,<3",
    symbols=(
        Symbol("torch.cuda:current_device"),
        Symbol("torch.cuda:_lazy_call"),
        Symbol("torch.overrides:TorchFunctionMode"),
        Symbol("torch.utils.data:DataLoader.__iter__", ("self",)),
    ),
    why="Megatron calls torch.cuda by name; opt-in, to train on gloo without a GPU",
    until="Megatron asks torch.accelerator for its device",
    install=_install,
)
