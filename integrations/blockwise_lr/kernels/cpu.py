"""The C++ kernel: OpenMP and vectors on the CPU, built at first use and kept for the next time."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import sysconfig
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..plan.step_plan import Rectangles
from ..rules.base import RULES, CppBody, UpdateRule
from .interface import GRADIENT_TYPES, Work, fits, refuse_other_sizes
from .reference import ReferenceKernel
from .tiling import tiles

_LOG = logging.getLogger(__name__)
_LOOPS = Path(__file__).with_name("loops.h")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # no effect where the processor has none
_DEVICES = ("cpu",)
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


def source() -> str:
    """The kernel's source: the loops, and the bodies of all rules that have one."""
    parts = [_LOOPS.read_text()]
    for rule in RULES.values():
        if rule.cpp is not None:
            parts.append(_struct(rule, rule.cpp))
    return "\n".join(parts)


_FUNCTION = """  template <typename G>
  static inline __attribute__((always_inline)) void {name}(int64_t n, float *p, const G *g, float *first, float *second,
                                                           {argument}, float lr, float keep, const Scalars s) {{
{body}
  }}
"""
_EXPRESSION = "  static inline float {name}(float moment, float {argument}, const Scalars s) {{ return {body}; }}\n"


def _struct(rule: UpdateRule, body: CppBody) -> str:
    """A rule's bodies as the loops call them: ``update`` for elements of one segment, ``update_each`` for elements that
    each have their own value of ``of_segment``."""
    parts, macro = [_FUNCTION.format(name="update", argument="float of_segment", body=body.update)], "ELEMENT_RULE"
    if rule.segment_state is not None:
        macro = "SEGMENT_RULE"
        each = re.sub(r"\bof_segment\b", "of_segments[i]", body.update)
        parts += [
            _FUNCTION.format(name="update_each", argument="const float *of_segments", body=each),
            _EXPRESSION.format(name="moment", argument="mean", body=body.moment),
            _EXPRESSION.format(name="of_segment", argument="lr", body=body.of_segment or "moment"),
        ]
    struct = f"struct {rule.title} {{\n{''.join(parts)}}};"
    return f"\nnamespace {{\n{struct}\n}}  // namespace\n{macro}({rule.name}, {rule.title})\n"


def _build() -> str:
    from torch.utils import cpp_extension

    text = source()
    # the flags of the processor too: a home shared by different machines must not share -march=native code
    key = hashlib.sha256(" ".join([text, *_FLAGS, platform.machine(), _processor()]).encode())
    name = f"blockwise_lr_cpu_{key.hexdigest()[:12]}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    built = folder / f"{name}.so"
    finished = built.with_suffix(".finished")  # another rank may be half-way through writing the library itself
    if not finished.exists():
        _find_ninja()
        file = folder / f"{name}.cpp"
        _write(file, text)
        _tell_of_stale_lock(folder / "lock")
        cpp_extension.load(
            name,
            [str(file)],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
            verbose=False,
        )
        finished.touch()
    return str(built)


def is_stale(lock: Path) -> bool:
    """Whether a lock of PyTorch's extension builds is one that a kill has left. Before PyTorch 2.14, whose locks their holders'
    end frees, and whose files stay: no build takes ten minutes, and the next one
    waits for it without a word and without end."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton") and lock.is_file() and time.time() - lock.stat().st_mtime > 600


def _tell_of_stale_lock(lock: Path) -> None:
    if is_stale(lock):
        _LOG.warning(
            "blockwise_lr: building the C++ kernel waits for %s, which is older than ten minutes: a build that was killed has "
            "left it; remove it",
            lock,
        )


def _write(file: Path, text: str) -> None:
    """Whole or not at all, for other ranks do the same; an equal file stays, so that nothing is built again."""
    if not file.exists() or file.read_text() != text:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(file)


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
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name in (rule.name for rule in RULES.values() if rule.cpp is not None):
        step = getattr(built, f"blockwise_step_{name}")
        step.argtypes = [pointer, pointer, number, *[pointer] * 4, count, *[pointer] * 3, number, number]
        step.restype = None
    built.blockwise_sum_squares.argtypes = [pointer, number, pointer, pointer, count, number]
    built.blockwise_sum_squares.restype = None
    return built


class CppKernel:
    """The kernel in C++. float32 tensors and rules with a body for it; others go to the reference. No element-sized
    temporaries."""

    name = "cpp"

    def __init__(self, built: ctypes.CDLL) -> None:
        self._built = built
        self._reference = ReferenceKernel()
        self._tiles: weakref.WeakKeyDictionary[Rectangles, np.ndarray] = weakref.WeakKeyDictionary()

    def step(self, rule: UpdateRule, works: Sequence[Work], *, presummed: bool = False) -> None:
        for work in works:
            if rule.cpp is None or not fits(_DEVICES, *work.tensors()) or not _takes(work.out):
                self._reference.step(rule, [work], presummed=presummed)
            else:
                self._step(rule, work, presummed)

    def sum_squares(self, grad: torch.Tensor, rectangles: Rectangles, sums: torch.Tensor) -> None:
        if not fits(_DEVICES, sums, grad):
            return self._reference.sum_squares(grad, rectangles, sums)
        refuse_other_sizes(rectangles, grad, slots=sums)
        tiles = self._tiles_of(rectangles)
        self._built.blockwise_sum_squares(
            grad.data_ptr(),
            GRADIENT_TYPES.index(grad.dtype),
            sums.data_ptr(),
            tiles.ctypes.data,
            len(tiles),
            torch.get_num_threads(),
        )

    def _step(self, rule: UpdateRule, work: Work, presummed: bool) -> None:
        rectangles, values = work.rectangles(presummed), work.values
        refuse_other_sizes(rectangles, work.param, work.grad, *work.states, work.out, slots=work.moments)
        tiles = self._tiles_of(rectangles)
        pointers = [state.data_ptr() for state in work.states]
        getattr(self._built, f"blockwise_step_{rule.name}")(
            work.param.data_ptr(),
            work.grad.data_ptr(),
            GRADIENT_TYPES.index(work.grad.dtype),
            (ctypes.c_void_p * 2)(pointers[0], pointers[-1]),
            None if work.moments is None else work.moments.data_ptr(),
            None if work.out is None else work.out.data_ptr(),
            tiles.ctypes.data,
            len(tiles),
            (ctypes.c_float * len(values.lrs))(*values.lrs),
            (ctypes.c_float * len(values.decays))(*values.decays),
            (ctypes.c_float * 8)(*values.scalars),
            work.moments is not None and not presummed,
            torch.get_num_threads(),
        )

    def _tiles_of(self, rectangles: Rectangles) -> np.ndarray:
        if rectangles not in self._tiles:
            self._tiles[rectangles] = tiles(rectangles, TILE)
        return self._tiles[rectangles]


def _takes(out: torch.Tensor | None) -> bool:
    return out is None or (out.dtype == torch.bfloat16 and out.device.type == "cpu")
