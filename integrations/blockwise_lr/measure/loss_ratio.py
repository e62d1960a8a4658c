"""How a step's loss stands to the lowest before it."""

from __future__ import annotations

import torch


def plain(loss: float | torch.Tensor) -> float:
    """A loss as a number, also one with its graph."""
    return float(loss.detach() if isinstance(loss, torch.Tensor) else loss)


class LossRatio:
    """A step's loss over the lowest before it: the paper's measure of instability.

    Attributes:
        steps: how many losses it was given.
        spikes: how many of them had a ratio above ``threshold``.
        largest: the largest ratio.
    """

    def __init__(self, threshold: float = 1.2) -> None:
        self.threshold = threshold
        self.lowest = float("inf")
        self.steps, self.spikes, self.largest = 0, 0, 0.0

    def add(self, loss: float | torch.Tensor) -> float:
        """The ratio of a step's loss; a loss that is no number is infinitely high. The first has none: 1."""
        loss = plain(loss)
        ratio = loss / self.lowest if self.steps else 1.0
        ratio = ratio if ratio == ratio else float("inf")
        self.steps += 1
        self.spikes += ratio > self.threshold
        self.largest = max(self.largest, ratio)
        self.lowest = min(self.lowest, loss) if loss == loss else self.lowest
        return ratio

    @property
    def share(self) -> float:
        """The share of steps above the threshold."""
        return self.spikes / max(self.steps, 1)

    def state_dict(self) -> dict[str, float]:
        """All of it, as plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on where a state was saved."""
        vars(self).update(state)
