"""The robust loss and the two regularizers of arXiv 2103.17268, and what is recorded of the bounds."""

from __future__ import annotations

import torch
from bounds import Bounds, Box
from torch.nn import functional as F


def robust_loss(bounds: Bounds, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the worst logits that the bounds allow."""
    return F.cross_entropy(-bounds.margins, labels)


def tightness(image: Box, hidden: list[Box], tolerance: float) -> torch.Tensor:
    """How far bounds have grown from the input to each layer, beyond 1 / tolerance; mean over layers."""
    first = image.radius.mean()
    terms = [F.relu(tolerance - first / box.radius.mean()) for box in hidden]
    return torch.stack(terms).sum() / (tolerance * len(hidden))


def relu_balance(hidden: list[Box], tolerance: float) -> torch.Tensor:
    """How unequal always active and always inactive neurons are in the sums of their means and of their squared
    deviations, beyond the tolerance; mean over layers. A layer without neurons of both kinds does not count."""
    total = hidden[0].center.new_zeros(())
    for box in hidden:
        active, inactive = (box.lower > 0).to(box.center), (box.upper < 0).to(box.center)
        deviation = (box.center - box.center.mean()) ** 2
        alpha = (box.center * active).sum() / -(box.center * inactive).sum()
        beta = (deviation * active).sum() / (deviation * inactive).sum()
        if bool(torch.isfinite(alpha) & torch.isfinite(beta) & (alpha > 0) & (beta > 0)):
            total = total + sum(F.relu(tolerance - torch.minimum(ratio, 1 / ratio)) for ratio in (alpha, beta))
    return total / (tolerance * len(hidden))


@torch.no_grad()
def figures(image: Box, hidden: list[Box]) -> dict[str, list[float]]:
    """Per hidden layer: how often wider the bounds are than the input's, and the shares of neurons that the bounds show to be
    always active, and always inactive."""
    first = image.radius.mean()
    found = {
        "growth": [box.radius.mean() / first for box in hidden],
        "active": [(box.lower > 0).float().mean() for box in hidden],
        "inactive": [(box.upper < 0).float().mean() for box in hidden],
    }
    return {key: [float(f"{float(value):.4g}") for value in values] for key, values in found.items()}
