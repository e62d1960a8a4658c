"""Optimizers that step hidden matrices as wholes (Muon) and everything else element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from ..blocks import BlockError, ParamLayout
from ..blocks.layout import MATRIX
from ..plan.dtensor import local
from ..plan.shards import ShardMap
from ..rules.muon import MATCH_RMS, MATRIX_BLOCKS
from .base import Due
from .elementwise import ElementwiseOptimizer
from .tensors import row

# of the quintic iteration, as in torch.optim.Muon
_A, _B, _C, _EPS = 3.4445, -4.7750, 2.0315, 1e-7


def orthogonalized(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz: about U V^T of each matrix's U S V^T, computed in bfloat16.

    Args:
        matrices: (batch, m, n).
        steps: iterations.
    """
    found = matrices.bfloat16()
    tall = found.shape[-2] > found.shape[-1]
    found = found.mT if tall else found
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), found, beta=_A)
    return found.mT if tall else found


class MatrixwiseOptimizer(ElementwiseOptimizer):
    """Base of the optimizers of rules that need whole matrices."""

    def attach_shards(self, shards: ShardMap) -> None:
        if not all(isinstance(flat, DTensor) for flat, _ in shards.flats):
            raise BlockError(
                f"{type(self).__name__} needs whole matrices, and this framework steps flat shards or slices of them; train "
                f"with plain PyTorch, DDP or FSDP2, or use BlockwiseAdamW"
            )
        super().attach_shards(shards)

    def is_matrix(self, tensor: torch.Tensor) -> bool:
        """Whether the rule's matrix step, and not AdamW's, is that of a parameter."""
        layout = self.block_map[self.block_map.require_name(tensor)]
        return (
            layout.kind == MATRIX
            and len(layout.shape) - layout.batch_dims == 2
            and set(layout.blocks) <= set(MATRIX_BLOCKS)
            and not tensor.is_complex()
        )

    def _step(self, due: Sequence[Due]) -> None:
        matrices = [one for one in due if self.is_matrix(one.tensor)]
        whole = {id(one.tensor) for one in matrices}
        self._step_rows([one for one in due if id(one.tensor) not in whole])
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for one in matrices:
            self._step_matrix(one, groups[id(one.tensor)])

    def _step_matrix(self, due: Due, group: dict) -> None:
        p, momentum = due.tensor, group["momentum"]
        assert p.grad is not None  # only tensors with a gradient are stepped
        grad, average = p.grad.to(p.dtype), self.state[p]["exp_avg"]
        average.lerp_(grad, 1 - momentum)
        update = grad.lerp(average, momentum) if group["nesterov"] else average
        layout = self.block_map[self.block_map.require_name(p)]
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        whole = whole.contiguous()
        moved, kept = torch.empty_like(whole), torch.empty_like(whole)
        lrs = {of.block: (lr, decay) for of, lr, decay in zip(due.plan.classes, due.values.lrs, due.values.decays)}
        for number, rows in enumerate(_rows_of(layout)):
            block = layout.pieces[number].block
            part = _matrices(whole, layout)[:, rows]
            step = orthogonalized(part, group["ns_steps"]).to(whole.dtype)
            lr, decay = lrs.get(block, (0.0, 0.0))  # parts that lie on other ranks alone are not kept here
            _matrices(moved, layout)[:, rows] = step * (lr * _scale(group["matrix_scale"], *part.shape[-2:]))
            _matrices(kept, layout)[:, rows] = 1 - lr * decay
        self._here(p, kept, layout, multiply=True)
        self._here(p, moved, layout, multiply=False)
        out = self.copy_of(p) if self._copies else None
        if out is not None:
            out.copy_(row(p))

    def _here(self, p: torch.Tensor, whole: torch.Tensor, layout: ParamLayout, *, multiply: bool) -> None:
        """Applies this rank's part of a factor or step."""
        part = local(p)
        if isinstance(p, DTensor):
            fragments = self.fragments_of(p)
            if not fragments:
                return
            whole = whole.reshape(-1)[fragments[0].start :][: part.numel()].view(part.shape)
        part.mul_(whole) if multiply else part.sub_(whole)


def _rows_of(layout: ParamLayout) -> list[list[int]]:
    """Of each piece, its output units over all repeats: a fused weight's q, its k, its v."""
    found: list[list[int]] = [[] for _ in layout.pieces]
    for number, (start, end, _) in enumerate(layout.spans()):
        found[number % len(layout.pieces)].extend(range(start, end))
    return found


def _matrices(tensor: torch.Tensor, layout: ParamLayout) -> torch.Tensor:
    """(stacked matrices, output units, inputs), as a view."""
    shaped = tensor.view(layout.batch, *tensor.shape[layout.batch_dims :])
    return shaped.mT if layout.transposed else shaped


def _scale(kind: str, rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns)) if kind == MATCH_RMS else math.sqrt(max(1.0, rows / columns))
