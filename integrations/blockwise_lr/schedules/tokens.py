"""Warmup by steps and cosine decay by tokens, for runs whose steps train on more and more of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..blocks.types import BlockError, shown
from .warmup_cosine import BlockwiseWarmupCosine


class BlockwiseTokenCosine(BlockwiseWarmupCosine):
    """As BlockwiseWarmupCosine, but what counts in the decay is the tokens that were trained on.

    With a sequence length warmup early steps hold fewer tokens, and by steps the rate would fall too fast per token (source:
    DeepSpeed's tutorial of arXiv 2108.06084). With T0 tokens at the end of the warmup, a step after T tokens has
    t = (T - T0) / (total_num_tokens - T0), at most 1, and lr = min_lr + (peak - min_lr) (1 + cos(pi t)) / 2. The warmup
    stays by steps: by tokens it would be slower, which is needless.

    Args:
        optimizer, warmup_num_steps, min_lr, last_batch_iteration: as of BlockwiseWarmupCosine.
        total_num_tokens: tokens, those of the warmup among them, until min_lr is reached.
        tokens: returns the tokens trained on so far, as ``SequenceLengthWarmup.tokens`` does; the same on every rank. Under
            DeepSpeed that of the engine's warmup.

    Raises:
        BlockError: as BlockwiseWarmupCosine.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_tokens: int,
        warmup_num_steps: int = 0,
        min_lr: float | None = None,
        last_batch_iteration: int = -1,
        tokens: Callable[[], int] | None = None,
    ) -> None:
        if isinstance(total_num_tokens, bool) or not isinstance(total_num_tokens, int) or total_num_tokens < 1:
            raise BlockError(
                f"BlockwiseTokenCosine: total_num_tokens is {shown(total_num_tokens)}; give a whole number of tokens, 1 or "
                f"above"
            )
        self.total_num_tokens = total_num_tokens
        self.tokens_of = tokens
        self.num_tokens = 0
        self.warmup_tokens: int | None = None  # at its end
        least = warmup_num_steps if isinstance(warmup_num_steps, int) else 1
        super().__init__(optimizer, max(least, 1), warmup_num_steps, min_lr, last_batch_iteration)

    @property
    def finished(self) -> bool:
        """Whether all tokens are trained on: where to stop."""
        return self.num_tokens >= self.total_num_tokens

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advances by one optimizer step. Collective where ``tokens`` is."""
        if self.tokens_of is not None:
            self.num_tokens = self.tokens_of()
        super().step(last_batch_iteration)

    def _weights(self) -> tuple[float, float]:
        if self.last_epoch < self.warmup_num_steps:
            return (self.last_epoch + 1) / self.warmup_num_steps, 0.0
        if self.warmup_tokens is None:
            self.warmup_tokens = self.num_tokens
        left = max(self.total_num_tokens - self.warmup_tokens, 1)
        weight = 0.5 * (1.0 + math.cos(math.pi * min((self.num_tokens - self.warmup_tokens) / left, 1.0)))
        return weight, 1.0 - weight

    def state_dict(self) -> dict[str, Any]:
        """Steps and tokens done, and the settings, which :meth:`load_state_dict` compares with its own."""
        state = {key: value for key, value in super().state_dict().items() if key != "total_num_steps"}
        mine = {name: getattr(self, name) for name in ("total_num_tokens", "num_tokens", "warmup_tokens")}
        return {**state, **mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step and token with this scheduler's own settings; logs those that differ.

        Raises:
            BlockError: ``state_dict`` is not the state of a BlockwiseTokenCosine.
        """
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get("num_tokens"), int):
            raise BlockError(
                "the checkpoint's scheduler state holds no count of tokens (it was saved without BlockwiseTokenCosine); load "
                "with load_lr_scheduler_states=False, or go on with the former scheduler"
            )
        self.num_tokens, self.warmup_tokens = state_dict["num_tokens"], state_dict["warmup_tokens"]
        super().load_state_dict(state_dict)
