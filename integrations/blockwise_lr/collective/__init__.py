"""What all ranks do, compare and fail together. Knows no framework and no optimizer."""

from . import roll_call
from .agreement import Difference, find_difference, gathered, same_on_all_ranks
from .errors import is_rank_zero, raise_on_all_ranks, run_on_all_ranks
from .scripts import errors_in_a_sentence

__all__ = [
    "Difference",
    "errors_in_a_sentence",
    "find_difference",
    "gathered",
    "is_rank_zero",
    "raise_on_all_ranks",
    "roll_call",
    "run_on_all_ranks",
    "same_on_all_ranks",
]
