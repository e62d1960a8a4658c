"""Cuts a batch to shorter sequences: which dimensions of which tensor are the sequence's, and two ways to cut them.

Tensors are told by name, as Hugging Face models and Megatron's batches name them, and where they have none by shape. What
neither tells stops the step: a tensor left whole beside cut ones would train on something else without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..blocks.types import BlockError

IGNORED = -100  # a label that does not count, as in torch's cross_entropy
IDS = ("input_ids", "tokens", "text", "inputs_embeds")  # the sequence's length is that of the first of these
_LAST = ("input_ids", "tokens", "text", "labels", "shift_labels", "position_ids", "token_type_ids", "loss_mask")
_MASKS = ("attention_mask", "mask")
_LABELS = ("labels", "shift_labels")
_KNOWN = (*IDS, *_LAST, *_MASKS, "cache_position")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "packed_seq_params", "seq_idx")


class Cutter:
    """Cuts batches.

    Args:
        dims: dimensions of the sequence of tensors that are not known, by name; [] leaves one whole.
        way: ``truncate`` keeps the first tokens of every row; ``reshape`` makes rows of all of them. Where the length does
            not divide the rows, the last row of each begins earlier, so that it ends where the sample does, and labels
            that the row before it has are ignored.
    """

    def __init__(self, dims: Mapping[str, Sequence[int]] | None = None, way: str = "truncate") -> None:
        self.dims = dict(dims or {})
        self.way = way

    def __call__(self, named: Mapping[str, Any], length: int, full: int | None = None) -> tuple[dict[str, Any], int]:
        """Cuts named tensors to ``length`` tokens per row; shorter ones stay as they are.

        Args:
            named: a batch, a model's arguments; a name of digits stands for a tensor without one.
            full: refuse rows that are longer than this.

        Returns:
            The batch, whose tensors are on the device that they were on, and how many tokens it holds.

        Raises:
            BlockError: a tensor of which is not known how to cut it; packed sequences; rows longer than ``full``.
        """
        size, rows, by_name = _size(named)
        if size is None:
            return dict(named), 0
        if full is not None and size > full:
            raise BlockError(
                f"the sequence length warmup ends at {full} tokens and a batch has rows of {size}; set its end to the "
                f"length of your data"
            )
        if size <= length:
            return dict(named), rows * size
        for name in _PACKED:
            if named.get(name) is not None:
                raise BlockError(
                    f"a sequence length warmup does not cut packed sequences ({name} is given); turn packing off"
                )
        unnamed = set() if by_name else {name for name in named if name not in _KNOWN}
        unnamed |= {name for name in named if name.isdigit()}
        whole = self.way == "truncate"
        starts = [0] if whole else [*range(0, size - length + 1, length)] + [size - length] * bool(size % length)
        cut = {
            name: self._cut(name, value, size, rows, length, starts, name in unnamed) for name, value in named.items()
        }
        if not whole and size % length:
            self._ignore_twice(cut, rows * (len(starts) - 1), length - size % length)
        return cut, rows * (length if whole else size)

    def _cut(self, name: str, value: Any, size: int, rows: int, length: int, starts: list[int], unnamed: bool) -> Any:
        if isinstance(value, Mapping):  # masks by kind of attention
            return {key: self._cut(name, inner, size, rows, length, starts, unnamed) for key, inner in value.items()}
        if not isinstance(value, torch.Tensor):
            if value is not None and not isinstance(value, (bool, int, float, str)) and name not in self.dims:
                raise BlockError(
                    f"a sequence length warmup does not know how to cut {name}, a {type(value).__name__}; leave it out, or "
                    f'say that it stays whole with "dims": {{"{name}": []}}'
                )
            return value
        dims = self._dims_of(name, value, size, unnamed)
        if not dims:
            if len(starts) > 1 and value.ndim and value.size(0) == rows:
                raise BlockError(
                    f"{name} of shape {tuple(value.shape)} has no sequence to make rows of; use the way truncate"
                )
            return value
        if len(starts) == 1:
            return _narrow(value, dims, 0, length)
        prefix = name in (
            "position_ids",
            "cache_position",
        )  # rows are sequences of their own, so that positions start anew
        pieces = [_narrow(value, dims, 0 if prefix else start, length) for start in starts]
        if 0 in dims or (prefix and value.size(0) == 1):
            return pieces[0]
        if value.size(0) == 1 < rows:
            pieces = [piece.expand(rows, *piece.shape[1:]) for piece in pieces]
        return torch.cat(pieces)

    def _dims_of(self, name: str, value: torch.Tensor, size: int, unnamed: bool) -> list[int]:
        """The dimensions of the sequence."""
        if name in self.dims:
            return [dim % value.ndim for dim in self.dims[name]]
        shape = value.shape
        square = [dim for dim in (value.ndim - 2, value.ndim - 1) if dim > 0 and shape[dim] == size]
        found: list[int] | None = None
        if name == "inputs_embeds":
            found = [1]
        elif name == "cache_position":
            found = [0]
        elif name in _MASKS:
            found = square or None
        elif name in _LAST:
            found = [value.ndim - 1] if value.ndim and shape[-1] == size else None
        elif unnamed and value.ndim > 3:
            found = square or None
        elif unnamed and value.ndim == 3 and len(square) == 2:  # a mask, or hidden states as wide as rows are long
            found = None if value.is_floating_point() else square
        elif unnamed and value.ndim > 1 and shape[1] == size:
            found = [1]
        if found is None and (size in shape or name in _LAST):
            raise BlockError(
                f"a sequence length warmup does not know which dimensions of {name}, of shape {tuple(shape)}, are the "
                f'sequence of {size}; say it with "dims": {{"{name}": [...]}}, or [] if none is'
            )
        return found or []

    def _ignore_twice(self, cut: dict[str, Any], first: int, overlap: int) -> None:
        """Leaves out labels that the row before has, in rows from ``first`` on."""
        found = [name for name in (*_LABELS, "loss_mask") if isinstance(cut.get(name), torch.Tensor)]
        if not found:
            raise BlockError(
                "the rows of a batch are no multiple of the sequence length, and there are no labels to leave the rest out "
                "of; use the way truncate, or a full length that every length divides"
            )
        for name in found:
            cut[name] = cut[name].clone()
            cut[name][first:, :overlap] = 0 if name == "loss_mask" else IGNORED


def _narrow(value: torch.Tensor, dims: Sequence[int], start: int, length: int) -> torch.Tensor:
    for dim in dims:
        value = value.narrow(dim, start, length)
    return value.contiguous()


def _size(named: Mapping[str, Any]) -> tuple[int | None, int, bool]:
    """The length of the rows, how many there are, and whether names told; None where nothing is a tensor.

    Raises:
        BlockError: there are tensors, and none is known to be the tokens.
    """
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    for name in IDS:
        if name in tensors and tensors[name].ndim >= 2:
            return tensors[name].size(1), tensors[name].size(0), True
    for value in tensors.values():
        if value.ndim == 2 and not value.is_floating_point() and value.dtype != torch.bool:
            return value.size(1), value.size(0), False
    if tensors:
        raise BlockError(
            f"a sequence length warmup finds no token ids among {', '.join(tensors)}; call the model with input_ids or "
            f"inputs_embeds, or with token ids of shape (rows, length)"
        )
    return None, 0, False


def map_tensors(batch: Any, cut: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Has the tensors of a batch of any form cut: a mapping by its names; lists, tuples and a tensor by their places."""
    if isinstance(batch, Mapping):
        done = cut(dict(batch))
        try:
            return type(batch)(done)  # type: ignore[call-arg]  # a BatchEncoding stays one
        except TypeError:
            return done
    flat: list[Any] = []
    _flatten(batch, flat)
    done = cut({str(number): value for number, value in enumerate(flat)})
    return _rebuilt(batch, iter(done.values()))


def _flatten(value: Any, found: list[Any]) -> None:
    if isinstance(value, (list, tuple)):
        for inner in value:
            _flatten(inner, found)
    else:
        found.append(value)


def _rebuilt(value: Any, tensors: Any) -> Any:
    if isinstance(value, (list, tuple)):
        made = [_rebuilt(inner, tensors) for inner in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return next(tensors)
