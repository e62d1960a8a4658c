"""Megatron without a GPU: the real models, schedules, optimizers and ``pretrain`` on the CPU with gloo.

Opt-in (``python -m blockwise_lr.megatron --on-cpu``), for laptops and CI; refuses where a GPU is. Beyond what
:mod:`~blockwise_lr.patches.cuda_on_cpu` redirects, Megatron keeps its generators' states through names of its own, and
builds its dataset helpers with a Makefile that its wheel does not carry (the wheel has them built).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from . import cuda_on_cpu
from .base import Patch, Undo
from .symbols import Symbol
from .upstream_megatron import PACKAGE, VERSIONS

_RANDOM = "megatron.core.tensor_parallel.random:"


def _get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _keep_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _CpuMesh:
    """What Megatron's FSDP2 wrapper asks of DeviceMesh, for which it names CUDA."""

    @staticmethod
    def from_group(group: Any, device_type: str) -> Any:
        return DeviceMesh.from_group(group, "cpu")


def _install(undo: Undo, _: None) -> None:
    if not cuda_on_cpu.PATCH.applied:
        undo.call(cuda_on_cpu.PATCH.apply())
    from megatron.core.datasets import utils
    from megatron.core.distributed import torch_fully_sharded_data_parallel
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    undo.set(random, "_get_cuda_rng_state", _get_state)
    undo.set(random, "_set_cuda_rng_state", _set_state)
    undo.set(torch_fully_sharded_data_parallel, "DeviceMesh", _CpuMesh)
    undo.set(token_dispatcher, "maybe_move_tensor_to_cpu", _keep_on_cpu)  # it leaves CPU tensors as they are
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16's router asks for the name also without Transformer Engine
        undo.set(moe_utils, "te_general_gemm", None)
    if not transformer_engine.HAVE_TE:  # 0.16 takes it for there, since what stands in for it imports
        undo.set(multi_latent_attention, "HAVE_TE", False)
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        undo.set(utils, "compile_helpers", lambda: None)


PATCH = Patch(
    name="megatron-on-cpu",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_RANDOM + "_get_cuda_rng_state", ("device", "clone", "graph_safe")),
        Symbol(_RANDOM + "_set_cuda_rng_state", ("new_state", "device", "graph_safe")),
        Symbol(
            "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
            ("tensor", "as_numpy", "record_stream"),
        ),
        Symbol("megatron.core.distributed.torch_fully_sharded_data_parallel:DeviceMesh"),
        Symbol("megatron.core.datasets.utils:compile_helpers", ()),
        Symbol("megatron.core.transformer.multi_latent_attention:HAVE_TE"),
        Symbol("megatron.core.extensions.transformer_engine:HAVE_TE"),
    ),
    why="Megatron assumes a GPU throughout; opt-in, to train on gloo without one",
    until="Megatron runs on the CPU by itself",
    install=_install,
)
