"""Power laws for the size, the tokens, the learning rate and the batch of a pre-training run, with where they were fitted.

N counts the weights of matrices that a token passes, the output layer among them and the input embedding not; D counts tokens;
C = 6 N D are floating-point operations. All learning rates are those of AdamW with one rate for all weights.

Sources: N and D, and "Porian": arXiv 2406.19146 (Porian and others), the fit of its last step on RefinedWeb (tuned learning
rate, batch and beta2; constant learning rate); its laws of learning rate and batch as quoted by Step Law. "Step Law": arXiv
2503.04715. "DeepSeek": arXiv 2401.02954. "Bjorck": arXiv 2409.19913.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..blocks.types import BlockError

# N* = _N_COEFFICIENT * C ** _N_EXPONENT, and the 95% bootstrap interval of the exponent
_N_COEFFICIENT, _N_EXPONENT, _N_LOW, _N_HIGH = 0.1189, 0.497, 0.491, 0.505
FITTED_FLOPS = (1.25e16, 2.56e19)
FITTED_PARAMETERS = (5e6, 0.91e9)
_MIDDLE = math.sqrt(FITTED_FLOPS[0] * FITTED_FLOPS[1])  # where an exponent's error moves nothing
_SCATTER = 1.25  # of one budget's optimum: two standard deviations of log N*, 0.11
_CHINCHILLA = 20.0  # tokens per parameter (arXiv 2203.15556), as most people quote it


@dataclass(frozen=True)
class Budget:
    """Floating-point operations, parameters and tokens that belong together: flops = 6 * parameters * tokens."""

    flops: float
    parameters: float
    tokens: float

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def outside(self) -> float:
        """How many times the compute lies outside of what the laws were fitted on; 1 inside."""
        low, high = FITTED_FLOPS
        return max(self.flops / high, low / self.flops, 1.0)


def allocate(flops: float | None = None, parameters: float | None = None, tokens: float | None = None) -> Budget:
    """The budget of any two of the three, or of one of them at the compute-optimal point.

    Raises:
        BlockError: none or all three are given, or one is not above 0.
    """
    given = {"flops": flops, "parameters": parameters, "tokens": tokens}
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        if not (math.isfinite(value) and value > 0):
            raise BlockError(f"{name} is {value}; give a number above 0")
    if len(known) not in (1, 2):
        said = "none" if not known else "all three"
        raise BlockError(f"{said} of flops, parameters and tokens are given; give one or two of them")
    if flops is None and (parameters is None or tokens is None):
        if parameters is not None:
            flops = (parameters / _N_COEFFICIENT) ** (1 / _N_EXPONENT)
        else:
            assert tokens is not None  # D* = C / (6 N*)
            flops = (tokens * 6 * _N_COEFFICIENT) ** (1 / (1 - _N_EXPONENT))
    if flops is None:
        assert parameters is not None and tokens is not None
        return Budget(6 * parameters * tokens, parameters, tokens)
    if parameters is None and tokens is None:
        return optimum(flops)
    if parameters is None:
        assert tokens is not None
        return Budget(flops, flops / (6 * tokens), tokens)
    return Budget(flops, parameters, flops / (6 * parameters))


def optimum(flops: float) -> Budget:
    """The compute-optimal size and tokens of a budget (Porian)."""
    parameters = _N_COEFFICIENT * flops**_N_EXPONENT
    return Budget(flops, parameters, flops / (6 * parameters))


def chinchilla(flops: float) -> Budget:
    """20 tokens per parameter."""
    parameters = math.sqrt(flops / (6 * _CHINCHILLA))
    return Budget(flops, parameters, _CHINCHILLA * parameters)


def optimum_range(flops: float) -> tuple[float, float]:
    """Parameters between which the optimum of a budget lies: the exponent's 95% interval around the middle of the fitted
    range, and the scatter of single budgets. Beyond the fitted range it is an extrapolation that this does not cover."""
    away, best = flops / _MIDDLE, optimum(flops).parameters
    factors = [away ** (exponent - _N_EXPONENT) for exponent in (_N_LOW, _N_HIGH)]
    return best * min(factors) / _SCATTER, best * max(factors) * _SCATTER


@dataclass(frozen=True)
class Law:
    """A published rule for AdamW's one learning rate and the tokens of a batch.

    Attributes:
        lr: of a budget, and N without the output layer.
        batch: tokens; None where the law does not say.
        fitted: where it was fitted, in words.
        parameters, tokens, flops: between which; None where that is not known.
    """

    name: str
    source: str
    lr: Callable[[Budget, float], float]
    batch: Callable[[Budget, float], float] | None
    fitted: str
    parameters: tuple[float, float] | None = None
    tokens: tuple[float, float] | None = None
    flops: tuple[float, float] | None = None

    def is_extrapolated(self, budget: Budget) -> bool:
        """Whether the budget lies outside of where the law was fitted."""
        pairs = (
            (budget.parameters, self.parameters),
            (budget.tokens, self.tokens),
            (budget.flops, self.flops),
        )
        return any(within is not None and not within[0] <= value <= within[1] for value, within in pairs)


LAWS = (
    Law(
        "Porian",
        "arXiv 2406.19146",
        lambda budget, body: 3.7 * budget.parameters**-0.36,
        lambda budget, body: 0.7576 * budget.parameters**0.703,
        "25M to 108M parameters, used for 5M to 0.9B; 20 tokens each, constant lr",
        parameters=FITTED_PARAMETERS,
    ),
    Law(
        "Step Law",
        "arXiv 2503.04715",
        lambda budget, body: 1.79 * body**-0.713 * budget.tokens**0.307,
        lambda budget, body: 0.58 * budget.tokens**0.571,
        "60M to 1B parameters, 2B to 100B tokens, cosine",
        parameters=(6e7, 1.1e9),
        tokens=(2e9, 1e11),
    ),
    Law(
        "DeepSeek",
        "arXiv 2401.02954",
        lambda budget, body: 0.3118 * (6 * body * budget.tokens) ** -0.125,
        lambda budget, body: 0.292 * (6 * body * budget.tokens) ** 0.3271,
        "1e17 to 2e19 FLOPs, multi-step decay",
        flops=(1e17, 2e19),
    ),
    Law(
        "Bjorck",
        "arXiv 2409.19913",
        lambda budget, body: 1.55e-3 * (budget.parameters / 1e9) ** -0.23 * (budget.tokens / 1e9) ** -0.32,
        None,
        "50M to 2.7B parameters, batches of 0.5M tokens, cosine",
        parameters=(5e7, 2.7e9),
    ),
)
