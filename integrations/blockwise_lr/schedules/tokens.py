"""Warmup by steps and cosine decay by tokens, for runs whose steps train on more and more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from ..blocks.types import BlockError, shown
from .base import BlockwiseSchedule
from .curves import Curve, Levels
from .shapes import decayed

_COUNTS = ("num_tokens", "warmup_tokens")
_NOT_HERE = ("block_warmup", "start_ratios", "end_ratios", "tokens_per_step")  # their lengths would be of two units


def _tokens(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("give a whole number of tokens, 1 or above")
    return value


class TokenCosine(Curve):
    """Linear warmup by steps, then a cosine by tokens: low + (top - low) (1 + cos(pi t)) / 2.

    t is the share of the tokens after the warmup that are trained on.
    """

    positional: ClassVar[tuple[str, ...]] = ("total_num_tokens", "warmup_num_steps", "min_lr")

    total_num_tokens: Annotated[
        int,
        BeforeValidator(_tokens),
        Field(description="tokens, those of the warmup among them, until min_lr is reached"),
    ]

    @model_validator(mode="after")
    def _one_unit(self) -> TokenCosine:
        for name in _NOT_HERE:
            if getattr(self, name):
                raise BlockError(
                    f"{name} is {shown(getattr(self, name))}, which a decay by tokens does not offer; leave it out"
                )
        return self

    def after(self, at: float, of: Levels) -> float:
        return decayed("cosine", of.top, of.low, (at - of.warmup) / self.total_num_tokens)


class BlockwiseTokenCosine(BlockwiseSchedule):
    """As BlockwiseWarmupCosine, but what counts in the decay is the tokens that were trained on.

    With a sequence length warmup early steps hold fewer tokens, and by steps the rate would fall too fast per token (source:
    DeepSpeed's tutorial of arXiv 2108.06084). With T0 tokens at the end of the warmup, a step after T tokens has
    t = (T - T0) / (total_num_tokens - T0), at most 1, and lr = min_lr + (peak - min_lr) (1 + cos(pi t)) / 2. The warmup
    stays by steps: by tokens it would be slower, which is needless.

    The argument ``tokens`` returns the tokens trained on so far, as ``SequenceLengthWarmup.tokens`` does; the same on every
    rank. Under DeepSpeed it is that of the engine's warmup.
    """

    curve_type = TokenCosine
    curve: TokenCosine

    def __init__(
        self, optimizer: Any, *positional: Any, tokens: Callable[[], int] | None = None, **settings: Any
    ) -> None:
        self.tokens_of = tokens
        self.num_tokens = 0
        self.warmup_tokens: int | None = None  # at its end
        super().__init__(optimizer, *positional, **settings)

    @property
    def finished(self) -> bool:
        """Whether all tokens are trained on: where to stop."""
        return self.num_tokens >= self.curve.total_num_tokens

    @property
    def position(self) -> float:  # type: ignore[override]  # beyond the warmup in shares of its tokens
        """The number of the step in the warmup, and W + t * total_num_tokens after it."""
        if self.last_epoch < self.curve.warmup_num_steps:
            return self.last_epoch + 1
        if self.warmup_tokens is None:
            self.warmup_tokens = self.num_tokens
        left = max(self.curve.total_num_tokens - self.warmup_tokens, 1)
        done = min((self.num_tokens - self.warmup_tokens) / left, 1.0)
        return self.curve.warmup_num_steps + done * self.curve.total_num_tokens

    def step(self, last_batch_iteration: int | None = None, *, tokens: int | None = None) -> None:
        """Advances by one optimizer step. Collective where the argument ``tokens`` of the schedule is."""
        if self.tokens_of is not None:
            self.num_tokens = self.tokens_of()
        super().step(last_batch_iteration, tokens=tokens)

    def state_dict(self) -> dict[str, Any]:
        """Steps and tokens done, and the settings, which :meth:`load_state_dict` compares with its own."""
        return {**super().state_dict(), **{name: getattr(self, name) for name in _COUNTS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step and token with this scheduler's own settings; logs those that differ.

        Raises:
            BlockError: ``state_dict`` is not the state of a BlockwiseTokenCosine.
        """
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("num_tokens"), int):
            raise BlockError(
                "the checkpoint's scheduler state holds no count of tokens (it was saved without BlockwiseTokenCosine); load "
                "with load_lr_scheduler_states=False, or go on with the former scheduler"
            )
        self.num_tokens, self.warmup_tokens = state_dict["num_tokens"], state_dict["warmup_tokens"]
        super().load_state_dict(state_dict)
