"""Models saved by ``save_pretrained``, read from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..blocks import BlockError


def load_causal_lm(folder: str) -> torch.nn.Module:
    """The causal language model in a folder, in float32.

    Raises:
        BlockError: the folder holds none that transformers can read.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise BlockError(f"{folder} holds no config.json; name a folder that save_pretrained has written")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BlockError(f"{folder} cannot be read as a causal language model: {error}") from error
