"""Two real texts that every machine with this project's requirements has: source code first, English then."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproduce"))
from data import english, library, tokenizer

LENGTH, SEQUENCES, HELD_OUT = 128, 16, 32  # tokens, sequences of a batch, held-out sequences of each text
SOURCES = {"old": library, "new": english}  # Python's standard library; the docstrings of PyTorch's modules


def tokens(folder: Path, which: str, validation: bool) -> np.ndarray:
    """Token ids of a text's side of the split, made once and kept in the folder."""
    file = folder / f"continual-{which}-{'validation' if validation else 'training'}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        encode = tokenizer(folder, 1024, "mixed").encode
        ids = [np.array(encode(text), dtype=np.uint16) for text in SOURCES[which](validation)]
        np.save(file, np.concatenate(ids))
    return np.load(file)


class Texts:
    """Batches of both texts."""

    def __init__(self, folder: Path) -> None:
        self._training = {which: tokens(folder, which, validation=False) for which in SOURCES}
        held = {which: tokens(folder, which, validation=True) for which in SOURCES}
        self.held_out = {which: _windows(ids, HELD_OUT, np.random.default_rng(0)) for which, ids in held.items()}

    def batch(self, which: str, seed: int, step: int, replay: float = 0.0) -> torch.Tensor:
        """(SEQUENCES, LENGTH + 1) token ids, the same for every arm; each sequence is of the old text by the chance
        ``replay``."""
        draws = np.random.default_rng((seed, step))
        ids, old = (_windows(self._training[name], SEQUENCES, draws) for name in (which, "old"))
        is_old = torch.from_numpy(draws.random(SEQUENCES) < replay)
        return torch.where(is_old[:, None], old, ids)


def _windows(ids: np.ndarray, count: int, draws: np.random.Generator) -> torch.Tensor:
    starts = draws.integers(0, len(ids) - LENGTH - 1, count)
    return torch.from_numpy(np.stack([ids[start : start + LENGTH + 1] for start in starts]).astype(np.int64))
