"""Random ds_configs: good ones with what they mean, and ones with a fault and the words its error must have."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from kinds import BIASED, KINDS, options_of

STEPS, LR = 3, 2e-3
NOT_A_NUMBER = [-1, "1e-4", None, True, float("nan"), float("inf"), [1.0], {}, 10**400, "fast"]
NOT_TRUE_OR_FALSE = ["false", 0, 1.0, None, [], "yes"]
FAULTS: dict[str, list[Any]] = {
    "lr": NOT_A_NUMBER,
    "eps": NOT_A_NUMBER,
    "weight_decay": NOT_A_NUMBER,
    "adamw_lr": [1e-3, -1, "1e-3", True],
    "betas": [0.9, None, [0.9], [0.9, 1.0], [0.9, -0.1], ["0.9", 0.95], "0.9", [], {"a": 1, "b": 2}, [0.9, 0.9, 0.9]],
    "block_lr_ratios": [
        {"qk": -1},
        {"qkv": 1.0},
        {"qk": "8"},
        {"qk": 0},
        {"": 1.0},
        [1],
        "papers",
        {"preset": "papers"},
        {"qk": None},
        {"qk": True},
    ],
    "block_weight_decay": [{"qk": -1}, {"norms": 1.0}, {"vo": "0.1"}, [1], 0.1, {"vo": float("nan")}],
    "decay_norms_and_biases": NOT_TRUE_OR_FALSE,
    "block_strict": NOT_TRUE_OR_FALSE,
    "min_lr": [-1, "0", True, [0.0], float("nan"), 1.0],
    "kernel": ["cuda", None, 3, "", ["cpp"]],
    "accept_mismatch": [["lrs"], 3, {"lr": 1}, [["lr"]], [None]],
    "ratio_fade_steps": [-1, 1.5, True, "3", None],
    "block_rules": [
        {"match": "*"},
        "*",
        3,
        [3],
        [{"match": "*", "block": "mlp"}],
        [{"match": "nothing.*", "block": "ffn"}],
        [{"block": "ffn"}],
        [{"match": "*", "block": "ffn", "split": ["q", "k", "v"]}],
        [{"match": "*lm_head*{", "block": "ffn"}],
        [{"match": 3, "block": "ffn"}],
        [{"match": "*", "block": "ffn", "batch_dims": -1}],
        [{"match": "*norm*", "block": "ffn", "batch_dims": 7}],
    ],
    "momentum": [0.9],
    "block_lr_ratio": [{"qk": 1.0}],
}
SCHEDULE_FAULTS: dict[str, list[Any]] = {
    "total_num_steps": [0, -3, 2.5, "10", True, None],
    "warmup_num_steps": [-1, 1.5, True, "1", 99],
    "min_lr": [-1, 1.0, "0", True, float("nan")],
    "last_batch_iteration": [-5, 0.5, True, "0"],
}
# what may differ between ranks, and the word that names it
UNLIKE = {
    "lr": 1e-3,
    "betas": [0.5, 0.9],
    "weight_decay": 0.7,
    "eps": 1e-4,
    "block_lr_ratios": {"vo": 3.0},
    "block_weight_decay": {"ffn": 0.3},
    "decay_norms_and_biases": True,
}


@dataclass
class Drawn:
    """One configuration.

    Attributes:
        model, kind, stage: as the tests' engines take them.
        optimizer, scheduler, zero: entries of the ds_config; scheduler None for a constant rate.
        unlike: optimizer settings of rank 1 alone.
        words: what the error must name; empty where the configuration must train.
    """

    model: str
    kind: str
    stage: int
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    zero: dict[str, Any] = field(default_factory=dict)
    unlike: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()


def draw(seed: int) -> Drawn:
    """The configuration of a seed: a third of them have a fault."""
    rng = random.Random(seed)
    stage = rng.randrange(4)
    kind = rng.choice([name for name, row in KINDS.items() if not row.like])
    models = ["llama", "llama_tied", "gpt2", "gpt_neox"]
    drawn = Drawn(
        rng.choice([model for model in models if not (KINDS[kind].jumps and model in BIASED)]),
        kind,
        stage,
        _optimizer(rng, kind),
        _schedule(rng),
        _zero(rng, stage),
    )
    fate = rng.random()
    if fate < 0.25:
        key = rng.choice([*FAULTS])
        drawn.optimizer[key] = rng.choice(FAULTS[key])
        drawn.words = (key.removesuffix("s"),) if key != "block_rules" else ("rule",)
    elif fate < 0.35 and drawn.scheduler is not None:
        key = rng.choice([*SCHEDULE_FAULTS])
        drawn.scheduler[key] = rng.choice(SCHEDULE_FAULTS[key])
        drawn.words = (key, "BlockwiseWarmupCosine")
    elif fate < 0.45:
        key = rng.choice([key for key in options_of(kind, UNLIKE) if drawn.optimizer.get(key) != UNLIKE[key]])
        drawn.unlike = {key: UNLIKE[key]}
        drawn.words = (key, "rank")
    return drawn


def _optimizer(rng: random.Random, kind: str) -> dict[str, Any]:
    ratios = {
        block: rng.choice([0.5, 1, 2.0, 7.5])
        for block in ("embedding", "head", "qk", "vo", "ffn", "norm")
        if rng.random() < 0.4
    }
    found = {
        "lr": LR,
        "betas": rng.choice([[0.9, 0.95], [0.8, 0.99], [0.0, 0.9]]),
        "eps": 1e-5,
        "weight_decay": rng.choice([0, 0.1, 0.5]),
        "kernel": rng.choice(["reference", "cpp", "auto"]),
    }
    if ratios or rng.random() < 0.3:
        found["block_lr_ratios"] = {**rng.choice([{}, {"preset": "paper"}]), **ratios}
    if rng.random() < 0.3:
        found["decay_norms_and_biases"] = rng.random() < 0.5
    if rng.random() < 0.3:
        found["min_lr"] = rng.choice([0, 1e-4, None])
    if rng.random() < 0.2:
        found["accept_mismatch"] = rng.choice([[], ["lr"], "block_lr_ratios"])
    if kind == "BlockwiseAdamMini" and rng.random() < 0.3:
        found["bias_segments"] = "element"
    return options_of(kind, found)


def _schedule(rng: random.Random) -> dict[str, Any] | None:
    if rng.random() < 0.3:
        return None
    return {"total_num_steps": STEPS, "warmup_num_steps": rng.randrange(STEPS), "min_lr": rng.choice([0, 1e-4])}


def _zero(rng: random.Random, stage: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, values, stages in (
        ("round_robin_gradients", [True], (1, 2)),
        ("overlap_comm", [True, False], (1, 2, 3)),
        ("contiguous_gradients", [False], (1, 2)),
        ("reduce_scatter", [False], (1, 2)),
        ("sub_group_size", [300, 2000], (3,)),
        ("reduce_bucket_size", [500, 5000], (1, 2, 3)),
        ("offload_optimizer", [{"device": "cpu"}], (1, 2, 3)),
        ("stage3_param_persistence_threshold", [0, 100], (3,)),
    ):
        if stage in stages and rng.random() < 0.3:
            found[key] = rng.choice(values)
    return found
