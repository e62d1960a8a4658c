"""Text that every machine with this project's requirements has: about half code, half English.

Code: the modules of Python's own standard library. English: the docstrings of PyTorch's modules, which are no part of
the code. One file in twenty is held out, by a hash of its name; the same names are held out on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from model import LENGTH, VOCABULARY

_SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}


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


def documents(validation: bool) -> Iterator[str]:
    """The texts of one side of the split."""
    for path in _files(Path(sysconfig.get_path("stdlib"))):
        if _held_out(path) == validation:
            yield path.read_text(encoding="utf-8", errors="ignore")
    for path in _files(Path(torch.__file__).parent):
        if _held_out(path) == validation:
            text = _docstrings(path.read_text(encoding="utf-8", errors="ignore"))
            if text:
                yield text + "\n"


def _tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    model = folder / f"mixed-{VOCABULARY}.model"
    if not model.exists():
        lines = (line for text in documents(validation=False) for line in text.splitlines() if line.strip())
        sample = [line[:500] for number, line in enumerate(lines) if number % 8 == 0]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_prefix=str(model.with_suffix("")),
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=["\n"],
            minloglevel=2,
            num_threads=1,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def _tokens(folder: Path, validation: bool) -> np.ndarray:
    file = folder / f"{'validation' if validation else 'training'}-{VOCABULARY}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(folder)
        ids = [np.array(tokenizer.encode(text), dtype=np.uint16) for text in documents(validation)]
        partial = file.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(ids))
        partial.rename(file)
    return np.load(file)


class Text:
    """Tokens of both sides of the split, made once and kept in a folder.

    ``digest`` tells texts apart: other versions of Python or PyTorch bring other text.
    """

    def __init__(self, folder: Path) -> None:
        self.training, validation = _tokens(folder, validation=False), _tokens(folder, validation=True)
        self.digest = hashlib.sha256(self.training.tobytes() + validation.tobytes()).hexdigest()[:16]
        windows = (len(validation) - 1) // LENGTH
        order = np.random.default_rng(0).permutation(windows)
        self._held_out = torch.from_numpy(np.stack([_window(validation, i) for i in order]))

    def batch(self, seed: int, step: int, sequences: int) -> torch.Tensor:
        """(sequences, LENGTH + 1) token ids of the ``step``-th batch, from 0: each epoch in an order of its own, the
        same for every arm and, token by token, for every batch size."""
        windows = (len(self.training) - 1) // LENGTH
        places = range(step * sequences, (step + 1) * sequences)
        return torch.from_numpy(
            np.stack([_window(self.training, _order(seed, n // windows, windows)[n % windows]) for n in places])
        )

    def held_out(self, sequences: int) -> torch.Tensor:
        """(sequences, LENGTH + 1) token ids, always the same."""
        return self._held_out[:sequences]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order of the windows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def _window(tokens: np.ndarray, number: int) -> np.ndarray:
    return tokens[number * LENGTH : (number + 1) * LENGTH + 1].astype(np.int64)
