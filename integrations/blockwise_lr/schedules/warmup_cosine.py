"""The coefficients of the paper's schedule: linear warmup and cosine decay per block type (arXiv 2502.19002)."""

from __future__ import annotations

import math


def warmup_cosine(step: int, warmup: int, total: int) -> tuple[float, float]:
    """The coefficients (a, b) of lr = a * peak + b * min_lr at an update.

    For step <= warmup: a = step / warmup, b = 0. Then, with t = (step - warmup) / (total - warmup), at most 1:
    a = (1 + cos(pi t)) / 2, b = 1 - a. Every block type has its own peak and all share min_lr. Source: get_lr of the
    official code of arXiv 2502.19002, without its update 0, whose learning rate is 0.

    Args:
        step: the number of the update, from 1.
        warmup: updates until the peak is reached.
        total: updates until min_lr is reached.
    """
    if step <= warmup:
        return step / warmup, 0.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    weight = 0.5 * (1.0 + math.cos(math.pi * progress))
    return weight, 1.0 - weight
