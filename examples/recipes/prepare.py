"""Tokenizes OpenWebText, or text that is here already, into files that both doors read.

A side of the split is one file of token ids, ``training.bin`` or ``validation.bin``: uint16, documents one after the
other, each followed by the end-of-text token. DeepSpeed's recipe reads it as it is; Megatron reads the same file through
the index beside it (``.idx``), which its own IndexedDatasetBuilder writes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"
SIDES = ("training", "validation")
HELD_OUT = 2000  # one document in so many of a data set validates
STAND_IN_VOCABULARY = 1024
BATCH = 1000  # documents that are tokenized together


def side_of(text: str) -> str:
    """The side of a document of a data set: by a hash of its text, so that neither order nor library matters."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return SIDES[number % HELD_OUT == 0]


def dataset_documents(name: str, revision: str | None) -> Iterator[tuple[str, str]]:
    """(side, text) of a data set of the hub or of a folder; downloads it at the first use.

    Raises:
        SystemExit: the library datasets is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(
            "prepare.py: reading a data set needs the library datasets, which is not installed here; pip install datasets, "
            "or take --stand-in"
        ) from None
    for row in load_dataset(name, revision=revision, split="train"):
        yield side_of(row["text"]), row["text"]


def stand_in_documents() -> Iterator[tuple[str, str]]:
    """(side, text) of Python's standard library, as the demo splits it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
    from corpus import is_validation, source_files

    for path in source_files():
        yield SIDES[is_validation(path)], path.read_text(encoding="utf-8", errors="ignore")


def stand_in_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, byte-level BPE, trained on these texts, with a vocabulary of 1024."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=STAND_IN_VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


class FlatFile:
    """A ``.bin`` without an index, through the calls that Megatron's IndexedDatasetBuilder has."""

    def __init__(self, file: str, dtype: type[np.number]) -> None:
        self._file: BinaryIO = open(file, "wb")  # noqa: SIM115  finalize closes it
        self._dtype = dtype

    def add_document(self, tokens: torch.Tensor, lengths: list[int]) -> None:
        self._file.write(tokens.numpy().astype(self._dtype).tobytes())

    def finalize(self, index: str) -> None:
        self._file.close()


def builder(file: Path, index: bool) -> Any:
    """What takes the documents of one side; with an index, Megatron's own builder.

    Raises:
        SystemExit: megatron-core is not installed.
    """
    if not index:
        return FlatFile(str(file), np.uint16)
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    except ImportError:
        raise SystemExit(
            "prepare.py: Megatron's index needs megatron-core, which is not installed here; install the extra megatron, "
            "or pass --no-index where only DeepSpeed is to read the data"
        ) from None
    return IndexedDatasetBuilder(str(file), dtype=np.uint16)


def write(documents: Iterable[tuple[str, str]], tokenizer: Any, out: Path, index: bool) -> dict[str, int]:
    """Writes both sides; returns the number of tokens of each, end-of-text tokens included."""
    builders = {side: builder(out / f"{side}.bin", index) for side in SIDES}
    counts = dict.fromkeys(SIDES, 0)
    documents = iter(documents)
    while batch := list(itertools.islice(documents, BATCH)):
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False)["input_ids"]
        for (side, _), ids in zip(batch, encoded):
            builders[side].add_document(torch.tensor([*ids, tokenizer.eos_token_id]), [len(ids) + 1])
            counts[side] += len(ids) + 1
        print(f"\r{sum(counts.values()) / 1e6:,.1f}M tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for side, made in builders.items():
        made.finalize(str(out / f"{side}.idx"))
    return counts


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files, made if it is not there")
    parser.add_argument("--stand-in", action="store_true", help="the standard library's text; downloads nothing")
    parser.add_argument("--dataset", default="Skylion007/openwebtext", help="data set of the hub, or a folder")
    parser.add_argument("--revision", help="branch or commit of the data set")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="tokenizer of the hub, or a folder")
    parser.add_argument("--documents", type=int, help="stop after so many documents")
    parser.add_argument("--no-index", action="store_true", help="no index for Megatron; needs no megatron-core")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "meta.json").unlink(missing_ok=True)  # it says that the files are whole, so it is written last
    documents = stand_in_documents() if args.stand_in else dataset_documents(args.dataset, args.revision)
    documents = itertools.islice(documents, args.documents)
    if args.stand_in:
        documents = list(documents)
        tokenizer = stand_in_tokenizer(text for side, text in documents[::4] if side == "training")
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if len(tokenizer) > 2**16 or tokenizer.eos_token_id is None:
        raise SystemExit(
            f"prepare.py: the tokenizer has {len(tokenizer)} tokens and {tokenizer.eos_token!r} to end a text; name one "
            "with at most 65536, which fit 16 bits, and an end-of-text token"
        )
    tokenizer.model_max_length = 10**9  # documents are whole here, whatever a model takes
    counts = write(documents, tokenizer, args.out, index=not args.no_index)
    tokenizer.save_pretrained(args.out / "tokenizer")
    meta = {
        "text": "standard library" if args.stand_in else args.dataset,
        "vocabulary": len(tokenizer),
        "separator": tokenizer.eos_token_id,
        "tokens": counts,
    }
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(json.dumps(meta))


if __name__ == "__main__":
    main()
