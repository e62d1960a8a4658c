"""Muon for the hidden matrices, AdamW for all else, with one learning rate per block type."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..blocks.types import BlockType
from .adamw import AdamW, AdamWOptions
from .options import NotNegative, Truth, as_number, one_of

MATRIX_BLOCKS = (BlockType.QK, BlockType.VO, BlockType.FFN)
MATCH_RMS, ORIGINAL = "match_rms_adamw", "original"


def _momentum(value: Any) -> float:
    number = as_number(value)
    if not 0 <= number < 1:
        raise ValueError("give a number, 0 or above and below 1")
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 99:
        raise ValueError("give a whole number from 1 to 99")
    return value


class MuonOptions(AdamWOptions):
    """Those of AdamW, for all that is no hidden matrix, and Muon's own."""

    FOLLOWS_ADAMW = False

    momentum: Annotated[float, BeforeValidator(_momentum), Field(description="decay rate of Muon's momentum")] = 0.95
    nesterov: Annotated[Truth, Field(description="Nesterov's form of the momentum")] = True
    ns_steps: Annotated[int, BeforeValidator(_count), Field(description="Newton-Schulz iterations")] = 5
    matrix_scale: Annotated[
        str,
        one_of(MATCH_RMS, ORIGINAL),
        Field(
            description="factor of an orthogonal update of m x n: match_rms_adamw, 0.2 sqrt(max(m, n)), so that lr means what "
            "it does for AdamW, or original, sqrt(max(1, m / n))"
        ),
    ] = MATCH_RMS
    weight_decay: Annotated[NotNegative, Field(description="decoupled; not applied to norms and biases by default")] = (
        0.1
    )


class Muon(AdamW):
    r"""Muon (as torch.optim.Muon) for hidden matrices and AdamW for the rest, with one learning rate per block type.

    A weight of QK, VO or FFN is taken apart into its q, k, v, gate and other parts, each expert by itself, and each part moves
    along an orthogonal matrix::

        p <- p (1 - lr wd)
        m <- m + (1 - mu) (g - m);    u = g + mu (m - g) with nesterov, else m
        p <- p - lr scale NewtonSchulz(u)

    with lr = ratio x base rate, put on after the orthogonalization, never on the momentum. Embeddings, heads, norms, biases,
    routers, convolutions and state-space mixers follow AdamW (:class:`~blockwise_lr.rules.adamw.AdamW`). A matrix that lies in
    parts on several ranks (FSDP2, ZeRO 1 to 3, Megatron's distributed optimizer, tensor parallelism) is brought to one of them
    in bfloat16, the precision of the iteration, and its parts go back, so that how it is cut changes nothing. Muon's matrices
    keep an unused second moment; :class:`~blockwise_lr.rules.muon_mini.MuonMini` does not.
    """

    name = "muon"
    title = "Muon"
    Options = MuonOptions
    complex_as_pairs = False
    whole_matrices = True
