"""A scaling law of one's own runs: the best size of every budget, and the power law through these.

The method of arXiv 2406.19146: at each budget of compute the losses of several sizes are joined by an Akima spline in log
size and log loss; its lowest point is the budget's optimum, unless it lies at an end; a straight line in logarithms goes
through the optima.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..blocks.types import BlockError

_POINTS = 25  # of the spline, between two sizes


@dataclass(frozen=True)
class PowerLaw:
    """parameters = coefficient * flops ** exponent.

    Attributes:
        optima: (flops, parameters) of the budgets whose optimum lies between two sizes.
    """

    coefficient: float
    exponent: float
    optima: tuple[tuple[float, float], ...]

    def parameters(self, flops: float) -> float:
        return self.coefficient * flops**self.exponent


def fit_optima(runs: Iterable[tuple[float, float, float]]) -> PowerLaw:
    """The law of runs.

    Args:
        runs: (flops, parameters, loss) of each; several sizes at each of several budgets, whose flops are equal.

    Raises:
        BlockError: fewer than two budgets have their best size between two others.
        ImportError: SciPy is not installed.
    """
    budgets: dict[float, list[tuple[float, float]]] = {}
    for flops, parameters, loss in runs:
        budgets.setdefault(flops, []).append((parameters, loss))
    found = [(flops, best) for flops, sizes in sorted(budgets.items()) if (best := _optimum(sizes)) is not None]
    if len(found) < 2:
        raise BlockError(
            f"the best size lies between two others at {len(found)} of {len(budgets)} budgets; give runs of three sizes or "
            f"more at two budgets or more, on both sides of the best"
        )
    exponent, intercept = np.polyfit(np.log([flops for flops, _ in found]), np.log([best for _, best in found]), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent), tuple(found))


def _optimum(sizes: list[tuple[float, float]]) -> float | None:
    """The size of the lowest loss on a spline through a budget's runs; None where it lies at an end."""
    from scipy.interpolate import Akima1DInterpolator

    ordered = sorted(sizes)
    if len(ordered) < 3:
        return None
    x, y = np.log([size for size, _ in ordered]), np.log([loss for _, loss in ordered])
    grid = np.linspace(x[0], x[-1], _POINTS * (len(x) - 1))
    lowest = int(np.argmin(Akima1DInterpolator(x, y)(grid)))
    return None if lowest in (0, len(grid) - 1) else float(np.exp(grid[lowest]))
