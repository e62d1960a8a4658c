"""Training sequences from a flat file of token ids."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch


def read_meta(data: Path) -> dict:
    """What prepare.py says of its files: vocabulary, separator, tokens of each side.

    Raises:
        SystemExit: the folder was not prepared to the end.
    """
    try:
        return json.loads((data / "meta.json").read_text())
    except FileNotFoundError:
        raise SystemExit(f"{data} holds no prepared data; run examples/recipes/prepare.py --out {data}") from None


class Sequences:
    """The windows of ``length`` tokens of a file of uint16 ids, one after the other and across documents."""

    def __init__(self, file: Path, length: int) -> None:
        self._tokens = np.memmap(file, dtype=np.uint16, mode="r")
        self._length = length
        self.count = (len(self._tokens) - 1) // length

    def batch(self, first: int, count: int, seed: int | None = None) -> torch.Tensor:
        """(count, length + 1) token ids of the windows from number ``first`` on.

        With a seed, numbers go on over epochs, each in an order of its own; without, they are the file's order. A number
        is always the same window, whatever the ranks and micro batches that it is asked for in.
        """
        numbers = range(first, first + count)
        if seed is not None:
            numbers = [int(_order(seed, n // self.count, self.count)[n % self.count]) for n in numbers]
        starts = (n * self._length for n in numbers)
        return torch.from_numpy(np.stack([self._tokens[s : s + self._length + 1].astype(np.int64) for s in starts]))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)
