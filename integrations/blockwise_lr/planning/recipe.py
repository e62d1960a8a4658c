"""A plan: one budget, and what follows from it for the batch, the rates, the steps and the memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..blocks import BlockError, BlockType, lr_ratios
from ..blocks.presets import DEFAULT
from ..sequence_length import LengthSchedule, WarmupOptions
from .laws import LAWS, Budget, Law, chinchilla, optimum, optimum_range
from .size import Size
from .state import StateBytes

# dense bfloat16 or float16 peak of one device in TFLOP/s, from its maker's data sheet
PEAK = {"a100": 312.0, "h100": 989.0, "h200": 989.0, "b200": 2250.0, "mi300x": 1307.0}


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        layout: of what the ranks share: "ZeRO-1", "TP8 x PP8 x DP4, distributed optimizer".
        ranks: all of them.
        states: of parameters, gradients, masters and moments.
        with_adamw: the same with AdamW.
        activations: of one micro-batch; None where they were not counted.
        peak: states and a micro-batch's forward and backward pass, when they take the most; None likewise.
        peak_with_adamw: the same with AdamW.
    """

    layout: str
    ranks: int
    optimizer: str
    states: StateBytes
    with_adamw: StateBytes
    activations: int | None
    peak: int | None = None
    peak_with_adamw: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What to run.

    Attributes:
        budget: floating-point operations, parameters (active, with the output layer) and tokens.
        body: parameters without the output layer, which some laws count.
        length: tokens of a sequence.
        sequences: of a batch, over all ranks.
        adamw_lr: for one rate; what ``adamw_lr`` of the blockwise optimizers takes.
        warmup_steps: as many tokens as the model has parameters, at most a tenth of the run.
        size: of the user's model, if there is one.
        memory: of the user's model, if there is one.
        lengths: of a sequence length warmup, under which tokens take more steps.
    """

    budget: Budget
    body: float
    length: int
    sequences: int
    adamw_lr: float
    warmup_steps: int
    size: Size | None = None
    memory: Memory | None = None
    lengths: LengthSchedule | None = None

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        return self.sequences * self.length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.lengths is not None:
            return self.lengths.steps_for(round(self.budget.tokens), self.sequences)
        return max(round(self.budget.tokens / self.batch), 1)

    @property
    def flops(self) -> float:
        """Of the whole run: with causal attention where the model is known, 6 per parameter and token otherwise."""
        if self.size is None:
            return self.budget.flops
        return self.size.flops_per_token(self.length) * self.budget.tokens

    def base_lr(self, ratios: str | Mapping[str, float] = DEFAULT) -> float:
        """The base learning rate of some ratios, by the rule of the option ``adamw_lr``."""
        return self.adamw_lr / lr_ratios(ratios)[BlockType.FFN]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        low, high = optimum_range(self.budget.flops)
        return {
            "flops": self.flops,
            "parameters": self.budget.parameters,
            "tokens": self.budget.tokens,
            "tokens_per_parameter": self.budget.tokens_per_parameter,
            "optimum": {**asdict(optimum(self.budget.flops)), "parameters_between": [low, high]},
            "chinchilla": asdict(chinchilla(self.budget.flops)),
            "times_outside_of_fitted_flops": self.budget.outside,
            "sequence_length": self.length,
            "batch_sequences": self.sequences,
            "batch_tokens": self.batch,
            "steps": self.steps,
            "sequence_length_warmup": None if self.lengths is None else _warmup(self.lengths),
            "warmup_steps": self.warmup_steps,
            "adamw_lr": self.adamw_lr,
            "base_lr": {"embedding": self.base_lr("embedding"), "paper": self.base_lr("paper")},
            "laws": [self._of_law(law) for law in LAWS],
            "size": None if self.size is None else {**asdict(self.size), "active": self.size.active},
            "memory": None if self.memory is None else _memory_dict(self.memory),
        }

    def _of_law(self, law: Law) -> dict[str, Any]:
        return {
            "law": law.name,
            "source": law.source,
            "adamw_lr": law.lr(self.budget, self.body),
            "batch_tokens": None if law.batch is None else law.batch(self.budget, self.body),
            "fitted": law.fitted,
            "extrapolated": law.is_extrapolated(self.budget),
        }


def _memory_dict(memory: Memory) -> dict[str, Any]:
    return {
        **asdict(memory),
        "states": {**asdict(memory.states), "total": memory.states.total},
        "with_adamw": {**asdict(memory.with_adamw), "total": memory.with_adamw.total},
    }


def recipe(
    budget: Budget,
    *,
    body: float | None = None,
    length: int = 2048,
    batch: int | None = None,
    ranks: int = 1,
    size: Size | None = None,
    memory: Memory | None = None,
    length_warmup: tuple[int, int] | None = None,
) -> Recipe:
    """The recipe of a budget, by the laws of arXiv 2406.19146.

    Args:
        body: parameters without the output layer; all of them otherwise.
        length: tokens of a sequence.
        batch: tokens of a batch; the law's otherwise. Rounded to whole sequences on every rank.
        ranks: data parallel.
        length_warmup: the first length and the steps of a sequence length warmup, linear up to ``length``.

    Raises:
        BlockError: a size below 1, or a warmup that is none.
    """
    for name, value in (("length", length), ("ranks", ranks), ("batch", 1 if batch is None else batch)):
        if value < 1:
            raise BlockError(f"{name} is {value}; give at least 1")
    porian, body = LAWS[0], body or budget.parameters
    assert porian.batch is not None
    tokens = porian.batch(budget, body) if batch is None else batch
    sequences = max(round(tokens / length / ranks), 1) * ranks
    steps = max(round(budget.tokens / (sequences * length)), 1)
    warmup = min(max(round(budget.parameters / (sequences * length)), 1), max(steps // 10, 1))
    lengths = None
    if length_warmup is not None:
        first, over = length_warmup
        lengths = LengthSchedule(
            WarmupOptions.checked({"start": first, "end": length, "steps": over}, "length warmup: ")
        )
    return Recipe(budget, body, length, sequences, porian.lr(budget, body), warmup, size, memory, lengths)


def _warmup(lengths: LengthSchedule) -> dict[str, Any]:
    """What a ds_config says of it."""
    return {"start": lengths.options.start, "end": lengths.options.end, "steps": lengths.options.steps}


_CLASS_OF = {"adamw": "BlockwiseAdamW", "adam_mini": "BlockwiseAdamMini"}


def ds_config(made: Recipe, *, micro_batch: int = 1, stage: int = 1, optimizer: str = "adamw") -> str:
    """A ds_config of the recipe, as JSON text.

    Raises:
        BlockError: an optimizer whose learning rate does not follow from AdamW's.
    """
    if optimizer not in _CLASS_OF:
        raise BlockError(
            f"the laws are AdamW's, and say no learning rate for {optimizer}; use {' or '.join(_CLASS_OF)}"
        )
    config: dict[str, Any] = {
        "train_batch_size": made.sequences,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": _CLASS_OF[optimizer],
            "params": {"adamw_lr": _rounded(made.adamw_lr), "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "BlockwiseWarmupCosine",
            "params": {"warmup_num_steps": made.warmup_steps, "total_num_steps": made.steps},
        },
    }
    if made.lengths is not None:
        config["sequence_length_warmup"] = _warmup(made.lengths)
        config["scheduler"] = {
            "type": "BlockwiseTokenCosine",
            "params": {"warmup_num_steps": made.warmup_steps, "total_num_tokens": round(made.budget.tokens)},
        }
    return json.dumps(config, indent=2)


def megatron_args(made: Recipe, *, micro_batch: int = 1, optimizer: str = "adamw") -> str:
    """Megatron's flags of the recipe, a line each; those of the model are the user's.

    Raises:
        BlockError: as for :func:`ds_config`.
    """
    if optimizer not in _CLASS_OF:
        raise BlockError(
            f"the laws are AdamW's, and say no learning rate for {optimizer}; use {' or '.join(_CLASS_OF)}"
        )
    lr = made.base_lr()
    lines = [
        f"--seq-length {made.length}",
        f"--micro-batch-size {micro_batch}",
        f"--global-batch-size {made.sequences}",
        f"--train-iters {made.steps}",
        f"--lr-decay-iters {made.steps}",
        f"--lr-warmup-iters {made.warmup_steps}",
        f"--optimizer blockwise_{optimizer}",
        f"--lr {_rounded(lr):g}",
        f"--min-lr {_rounded(lr / 20):g}",
        "--lr-decay-style cosine",
        "--weight-decay 0.1",
        "--adam-beta1 0.9",
        "--adam-beta2 0.95",
        "--clip-grad 1.0",
        "--bf16",
        "--use-distributed-optimizer",
    ]
    if made.lengths is not None:
        options = made.lengths.options
        lines += [
            f"--sequence-length-warmup-start {options.start}",
            f"--sequence-length-warmup-steps {options.steps}",
            f"--lr-decay-tokens {round(made.budget.tokens)}",
        ]
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
