"""``blockwise-lr plan``: how large, how long, at what rate, and what fits in memory."""

from .fit import fit_optima
from .laws import LAWS, Budget, Law, allocate
from .size import Size, model_size
from .state import StateBytes, state_bytes

__all__ = [
    "LAWS",
    "Budget",
    "Law",
    "Size",
    "StateBytes",
    "allocate",
    "fit_optima",
    "model_size",
    "state_bytes",
]
