"""Real text that every machine has: the source of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

VOCABULARY = 1024
_SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}


def source_files() -> list[Path]:
    """The standard library's modules, in an order that is the same everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not _SKIP.intersection(path.relative_to(root).parts))


def is_validation(path: Path) -> bool:
    """Whether a file is kept out of training: one in twenty, by a hash of its name."""
    return hashlib.sha256(path.name.encode()).digest()[0] % 20 == 0


def texts(validation: bool) -> Iterator[str]:
    """The files of one side of the split."""
    for path in source_files():
        if is_validation(path) == validation:
            yield path.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(folder: Path) -> Path:
    """Trains a sentencepiece model on part of the training side, once; returns its file."""
    model = folder / f"python-{VOCABULARY}.model"
    if not model.exists():
        lines = (line for text in texts(validation=False) for line in text.splitlines() if line.strip())
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
        )
    return model


def tokens(folder: Path, validation: bool) -> np.ndarray:
    """Token ids of one side of the split, uint16, (tokens,); made once and kept in the folder."""
    file = folder / f"{'validation' if validation else 'training'}-{VOCABULARY}.npy"
    if not file.exists():
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(train_tokenizer(folder)))
        ids = [np.array(tokenizer.encode(text), dtype=np.uint16) for text in texts(validation)]
        np.save(file, np.concatenate(ids))
    return np.load(file, mmap_mode="r")
