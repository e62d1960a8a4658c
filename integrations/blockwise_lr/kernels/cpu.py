"""The C++ kernel: OpenMP and vectors on the CPU, built at first use and kept for the next time."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sysconfig
import weakref
from pathlib import Path

import numpy as np
import torch

from ..plan.step_plan import Rectangles, StepPlan
from .interface import StepValues, refuse_other_sizes
from .reference import ReferenceKernel
from .tiling import tiles

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # no effect where the processor has none
_GRADIENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Elements per tile: what one thread works on at a time. Large enough that starting a tile costs nothing, small enough
# that a segment's gradient is still in the cache when it is read again.
TILE = 1 << 16
SWITCH = "BLOCKWISE_LR_CPU_KERNEL"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be built; then one warning says why.

    The build takes a few seconds, is kept in PyTorch's extension folder (TORCH_EXTENSIONS_DIR), and is safe when
    several ranks start at once. ``BLOCKWISE_LR_CPU_KERNEL=0`` turns it off.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        return _declare(ctypes.CDLL(_build()))
    except Exception as error:  # no compiler, no ninja, a read-only home: every step still works without
        _LOG.warning(
            "blockwise_lr: the C++ kernel could not be built, so optimizer steps on the CPU use plain torch, "
            "which is slower (%s: %s); install g++ and ninja, or set %s=0 to silence this",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "",
            SWITCH,
        )
        return None


def _build() -> str:
    from torch.utils import cpp_extension

    # the flags of the processor too: a home shared by different machines must not share -march=native code
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join([*_FLAGS, platform.machine(), _processor()]).encode())
    name = f"blockwise_lr_cpu_{key.hexdigest()[:12]}"
    built = Path(cpp_extension._get_build_directory(name, verbose=False)) / f"{name}.so"
    finished = built.with_suffix(".finished")  # another rank may be half-way through writing the library itself
    if not finished.exists():
        _find_ninja()
        cpp_extension.load(
            name, [str(_SOURCE)], extra_cflags=_FLAGS, extra_ldflags=["-fopenmp"], is_python_module=False, verbose=False
        )
        finished.touch()
    return str(built)


def _find_ninja() -> None:
    """Puts this environment's scripts on PATH: ninja lies there, also where the environment is not activated."""
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _declare(built: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, count, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    step = [pointer, pointer, number, pointer, pointer, pointer, pointer, count, pointer, pointer] + [real] * 5
    built.blockwise_adamw.argtypes = [*step, number]
    built.blockwise_adam_mini.argtypes = [*step, number, number]
    built.blockwise_sum_squares.argtypes = [pointer, number, pointer, pointer, count, number]
    for function in (built.blockwise_adamw, built.blockwise_adam_mini, built.blockwise_sum_squares):
        function.restype = None
    return built


class CppKernel:
    """The kernel in C++. float32 tensors; others go to the reference. No element-sized temporaries."""

    name = "cpp"

    def __init__(self, built: ctypes.CDLL) -> None:
        self._built = built
        self._reference = ReferenceKernel()
        self._tiles: weakref.WeakKeyDictionary[Rectangles, np.ndarray] = weakref.WeakKeyDictionary()

    def adamw(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        if not _fits(param, grad, exp_avg, exp_avg_sq) or not _takes(out):
            return self._reference.adamw(param, grad, exp_avg, exp_avg_sq, plan, values, out)
        refuse_other_sizes(plan.local, param, grad, exp_avg, exp_avg_sq, out)
        self._built.blockwise_adamw(
            *self._arguments(param, grad, exp_avg, exp_avg_sq, plan.local, values, out), torch.get_num_threads()
        )

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        if not _fits(sums, grad):
            return self._reference.sum_squares(grad, rectangles, sums)
        refuse_other_sizes(rectangles, grad, slots=sums)
        tiles = self._tiles_of(rectangles)
        self._built.blockwise_sum_squares(
            grad.data_ptr(),
            _GRADIENT_TYPES[grad.dtype],
            sums.data_ptr(),
            tiles.ctypes.data,
            len(tiles),
            torch.get_num_threads(),
        )

    def adam_mini(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        if not _fits(param, grad, exp_avg, exp_avg_sq) or not _takes(out):
            return self._reference.adam_mini(param, grad, exp_avg, exp_avg_sq, plan, values, out)
        refuse_other_sizes(plan.local, param, grad, exp_avg, out, slots=exp_avg_sq)
        self._built.blockwise_adam_mini(
            *self._arguments(param, grad, exp_avg, exp_avg_sq, plan.local, values, out), 1, torch.get_num_threads()
        )

    def adam_mini_presummed(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        plan: StepPlan,
        values: StepValues,
        out: torch.Tensor | None = None,
    ) -> None:
        if not _fits(param, grad, exp_avg, exp_avg_sq) or not _takes(out):
            return self._reference.adam_mini_presummed(param, grad, exp_avg, exp_avg_sq, plan, values, out)
        refuse_other_sizes(plan.shared, param, grad, exp_avg, out, slots=exp_avg_sq)
        self._built.blockwise_adam_mini(
            *self._arguments(param, grad, exp_avg, exp_avg_sq, plan.shared, values, out), 0, torch.get_num_threads()
        )

    def _arguments(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        rectangles: Rectangles,
        values: StepValues,
        out: torch.Tensor | None,
    ) -> tuple:
        tiles = self._tiles_of(rectangles)
        lrs = (ctypes.c_float * len(values.lrs))(*values.lrs)
        decays = (ctypes.c_float * len(values.decays))(*values.decays)
        copy = None if out is None else out.data_ptr()
        return (
            param.data_ptr(),
            grad.data_ptr(),
            _GRADIENT_TYPES[grad.dtype],
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            copy,
            tiles.ctypes.data,
            len(tiles),
            lrs,
            decays,
            values.beta1,
            values.beta2,
            values.eps,
            values.correction1,
            values.correction2_sqrt,
        )

    def _tiles_of(self, rectangles: Rectangles) -> np.ndarray:
        if rectangles not in self._tiles:
            self._tiles[rectangles] = tiles(rectangles, TILE)
        return self._tiles[rectangles]


def _fits(*tensors: torch.Tensor) -> bool:
    """Whether the first is float32 and the others are, or are gradients of a known type, all of them on the CPU."""
    return (
        all(t.device.type == "cpu" for t in tensors)
        and tensors[0].dtype == torch.float32
        and all(
            t.dtype in _GRADIENT_TYPES if number == 1 else t.dtype == torch.float32 for number, t in enumerate(tensors)
        )
    )


def _takes(out: torch.Tensor | None) -> bool:
    return out is None or (out.dtype == torch.bfloat16 and out.device.type == "cpu")
