"""Limits of gradient norms that follow the norms: a percentile of a block type's own last ones (AutoClip, arXiv 2007.14469)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

KEPT = 1000  # steps whose norms are remembered; AutoClip remembers all, which holds a limit up while norms fall
KEY = "clip_norms"  # in every param group, so that all frameworks' checkpoints hold it


class ClipHistory:
    """The last norms of block types, oldest first, NaN where there was none.

    Args:
        percentiles: number of a block type -> percentile, above 0 and up to 100.
        groups: the optimizer's param groups, where the norms are kept.
    """

    def __init__(self, percentiles: Mapping[int, float], groups: Sequence[MutableMapping[str, Any]]) -> None:
        self._percentiles, self._groups = percentiles, groups

    def add(self, norms: torch.Tensor) -> None:
        """Takes a step's norms, by the number of the block type; one that is not finite or 0 is none."""
        known = next((group[KEY] for group in self._groups if group.get(KEY) is not None), None)
        if known is None:
            known = torch.full((KEPT, len(norms)), torch.nan, dtype=norms.dtype, device=norms.device)
        new = torch.where(torch.isfinite(norms) & (norms > 0), norms, torch.nan)
        kept = torch.cat([known[1:].to(norms.device), new[None]])
        for group in self._groups:
            group[KEY] = kept

    def limit(self, number: int) -> torch.Tensor:
        """The percentile of the norms so far, the present one with them; infinite where there are none."""
        norms = self._groups[0][KEY][:, number]
        return torch.nanquantile(norms, self._percentiles[number] / 100).nan_to_num(nan=torch.inf)
