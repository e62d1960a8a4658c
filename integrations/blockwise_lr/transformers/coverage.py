"""``blockwise-lr families --installed``: how many models of the installed transformers map, by category."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..blocks import BlockError, map_blocks

CATEGORIES = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "PRETRAINING",
)


@dataclass(frozen=True)
class Coverage:
    """The classes of one category.

    Attributes:
        category: its name in transformers' auto classes.
        mapped: classes that map strictly.
        refused: class name -> the error of those that do not.
        not_built: classes whose default config builds no model here (a value or a library is missing).
    """

    category: str
    mapped: tuple[str, ...]
    refused: dict[str, str]
    not_built: tuple[str, ...]


def coverage(categories: Sequence[str] = CATEGORIES) -> Iterator[Coverage]:
    """Builds every class's model on the meta device from its default config, and maps it."""
    seen: set[str] = set()
    for category in categories:
        mapped, refused, not_built = [], {}, []
        for name in _classes(category):
            if name in seen:
                continue
            seen.add(name)
            model = _build(name)
            if model is None:
                not_built.append(name)
                continue
            try:
                map_blocks(model)
            except BlockError as error:
                refused[name] = str(error)
            else:
                mapped.append(name)
        yield Coverage(category.lower().replace("_", "-"), tuple(mapped), refused, tuple(not_built))


def _classes(category: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, f"MODEL_FOR_{category}_MAPPING_NAMES", {})
    found = [n for value in mapping.values() for n in (value if isinstance(value, (list, tuple)) else (value,))]
    return list(dict.fromkeys(found))


def _build(name: str) -> nn.Module | None:
    import transformers

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            cls = getattr(transformers, name)
            return cls(cls.config_class())
        except Exception:  # any model's own, which says nothing of its map
            return None
