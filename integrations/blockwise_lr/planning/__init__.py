"""``blockwise-lr plan``: how large, how long, at what rate, and what fits in memory."""

from .fit import fit_optima
from .laws import LAWS, Budget, Law, allocate
from .megatron_layout import MegatronLayout
from .megatron_state import MegatronStates
from .size import Size, model_size
from .state import StateBytes, state_bytes

__all__ = [
    "LAWS",
    "Budget",
    "Law",
    "MegatronLayout",
    "MegatronStates",
    "Size",
    "StateBytes",
    "allocate",
    "fit_optima",
    "model_size",
    "state_bytes",
]
