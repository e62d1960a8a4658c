"""The arms: what is compared, as data. Everything that is not in this table is the same for all of them.

The schedule is BlockwiseWarmupCosine for every arm: warmup over a tenth of the run, then a cosine from each peak to
``floor`` x base learning rate; betas (0.9, 0.95), eps 1e-8, weight decay 0.1, gradients clipped at norm 1. Lion's betas are
(0.95, 0.98), its weight decay 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, map_blocks

BETA1, EPS, WEIGHT_DECAY, CLIP = 0.9, 1e-8, 0.1, 1.0
AUTO_AT = (0.1, 0.15, 0.2, 0.3, 0.5)  # from the end of the warmup
LION_BETAS, LION_WEIGHT_DECAY = (0.95, 0.98), 1.0  # as the official scripts of the paper


@dataclass(frozen=True)
class Arm:
    """One optimizer and how it is set.

    Attributes:
        optimizer: "AdamW" is torch.optim.AdamW, with one learning rate; the others are this project's.
        center: where its grid of learning rates starts, in half octaves from 1e-3 (see :func:`learning_rate`).
        options: further arguments of the optimizer.
        decay_all: weight decay on the norms as well.
        floor: the last learning rate of every block type, over the base learning rate.
        length: steps of this arm, over those of the others (its schedule is as long).
        embedding_std: standard deviation of the input embedding at the start.
        auto_at: the shares of a run after which AutoRatios measures, and rebalances the ratios that are set in ``options``.
        warmup: share of the run.
        beta2: of Adam's second moment.
        rate_of: an arm whose best learning rate this one takes over, in place of a search of its own.
    """

    optimizer: str
    center: int
    options: dict[str, Any] = field(default_factory=dict)
    decay_all: bool = False
    floor: float = 0.05
    length: int = 1
    embedding_std: float = 0.02
    auto_at: tuple[float, ...] = ()
    warmup: float = 0.1
    beta2: float = 0.95
    rate_of: str = ""


PAPER = {"block_lr_ratios": "paper"}  # embedding and head 10, QK 8, FFN 6, VO 4, norm 1


def _ratios(**ratios: float) -> dict[str, Any]:
    return {"block_lr_ratios": {"embedding": 1, "qk": 1, "ffn": 1, "vo": 1, "norm": 1, **ratios}}


ARMS = {
    "adamw": Arm("AdamW", 4),
    "blockwise": Arm("BlockwiseAdamW", -2, PAPER),
    "mini": Arm("BlockwiseAdamMini", -2, PAPER),
    # as if one only added ratios to a run of AdamW's and kept its learning rate
    "blockwise-adamw-lr": Arm("BlockwiseAdamW", 4, PAPER, rate_of="adamw"),
    # Lion with one rate, with the paper's ratios, and with embedding and head alone at ten times the rest
    "lion": Arm("BlockwiseLion", -3, {"block_lr_ratios": "uniform"}),
    "blockwise-lion": Arm("BlockwiseLion", -9, PAPER),
    "lion-embedding-head-10": Arm("BlockwiseLion", -5, _ratios(embedding=10)),
    # is it the ratios, or that shared floors let the matrices decay further?
    "adamw-floor-0": Arm("AdamW", 4, floor=0.0),
    "blockwise-floor-0": Arm("BlockwiseAdamW", -2, PAPER, floor=0.0),
    # what else could make the difference
    "adamw-decay-all": Arm("AdamW", 4, decay_all=True),
    "blockwise-decay-all": Arm("BlockwiseAdamW", -2, PAPER, decay_all=True),
    "adamw-twice": Arm("AdamW", 4, length=2),  # twice the steps, as the paper counts speed
    # which blocks give it
    "low-norm": Arm("BlockwiseAdamW", 4, _ratios(norm=0.1)),
    "low-vo": Arm("BlockwiseAdamW", 4, _ratios(vo=0.5)),
    "embedding-10": Arm("BlockwiseAdamW", 4, _ratios(embedding=10, head=1)),
    "embedding-head-10": Arm("BlockwiseAdamW", 2, _ratios(embedding=10)),
    "mini-embedding-head-10": Arm("BlockwiseAdamMini", 2, _ratios(embedding=10)),
    "head-1": Arm("BlockwiseAdamW", -2, {"block_lr_ratios": {"preset": "paper", "head": 1}}),
    "norm-6": Arm("BlockwiseAdamW", -2, {"block_lr_ratios": {"preset": "paper", "norm": 6}}),
    "matrices-only": Arm("BlockwiseAdamW", -2, _ratios(qk=8, ffn=6, vo=4)),
    # a longer memory of the second moment, and shorter and longer warmups
    **{
        f"{name}-{change}": Arm(optimizer, center, options, **settings)
        for name, optimizer, center, options in (
            ("adamw", "AdamW", 4, {}),
            ("blockwise", "BlockwiseAdamW", -2, PAPER),
            ("embedding-head-10", "BlockwiseAdamW", 4, _ratios(embedding=10)),
        )
        for change, settings in (
            ("beta2-999", {"beta2": 0.999}),
            ("warmup-2", {"warmup": 0.02}),
            ("warmup-30", {"warmup": 0.3}),
        )
    },
    # ratios found while training, from one rate and from the paper's ratios
    "auto": Arm("BlockwiseAdamW", 4, {"block_lr_ratios": "uniform"}, auto_at=AUTO_AT),
    "auto-paper": Arm("BlockwiseAdamW", -2, PAPER, auto_at=AUTO_AT),
    # what AutoRatios finds at 95 steps of 2k, rounded, and kept
    "found": Arm("BlockwiseAdamW", 2, _ratios(embedding=12, head=3, qk=10, vo=1, ffn=1, norm=30)),
    # what `blockwise-lr tune` has found at 95 steps of 2k (tune/), over the FFN's
    "tuned": Arm("BlockwiseAdamW", 3, _ratios(embedding=27, head=13, qk=5, vo=1.3, ffn=1, norm=1.3)),
    "embedding-norm": Arm("BlockwiseAdamW", 2, _ratios(embedding=10, norm=30)),
    # does a rate of their own do more for embeddings than a start at the scale of the norms' outputs?
    "adamw-embedding-1": Arm("AdamW", 4, embedding_std=1.0),
    "blockwise-embedding-1": Arm("BlockwiseAdamW", -2, PAPER, embedding_std=1.0),
}


def learning_rate(k: int) -> float:
    """1e-3 times 2^(k/2), to three digits: what all grids are made of."""
    return float(f"{1e-3 * 2 ** (k / 2):.3g}")


def build_optimizer(arm: Arm, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """The arm's optimizer for a model, at a base learning rate."""
    if arm.optimizer == "AdamW":
        norms = 0.0 if not arm.decay_all else WEIGHT_DECAY
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": norms},
        ]
        fused = next(model.parameters()).is_cuda
        return torch.optim.AdamW(
            groups, lr=lr, betas=(BETA1, arm.beta2), eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused
        )
    of_adam = {"betas": (BETA1, arm.beta2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    optimizer, settings = {
        "BlockwiseAdamW": (BlockwiseAdamW, of_adam),
        "BlockwiseAdamMini": (BlockwiseAdamMini, of_adam),
        "BlockwiseLion": (BlockwiseLion, {"betas": LION_BETAS, "weight_decay": LION_WEIGHT_DECAY}),
    }[arm.optimizer]
    return optimizer(
        model.named_parameters(),
        lr=lr,
        block_map=map_blocks(model),
        decay_norms_and_biases=arm.decay_all,
        min_lr=arm.floor * lr,
        **settings,
        **arm.options,
    )
