"""One run: a small GPT-2 at a learning rate, with or without a sequence length warmup, on the same number of tokens."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from blockwise_lr import BlockwiseAdamW, map_blocks
from blockwise_lr.measure import BlockMonitor, LossRatio
from blockwise_lr.schedules import BlockwiseTokenCosine
from blockwise_lr.sequence_length import SequenceLengthWarmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproduce"))
from data import Text
from training import Place, commit, machine, versions

LENGTH, SEQUENCES, VALIDATE, HELD_OUT = 256, 16, 5, 32  # tokens, sequences of a batch, steps, held-out sequences
BETAS, WARMUP = (0.9, 0.95), 20
START = 8


@dataclass(frozen=True)
class Form:
    """Sizes and lengths of all runs of a table.

    Attributes:
        steps: of the runs at full length; the others get as many tokens.
        grows: steps of the sequence length warmup.
        lrs: tried by both arms.
        clip: norm that gradients are clipped at; none without.
    """

    width: int
    layers: int
    steps: int
    grows: int
    lrs: tuple[float, ...]
    seeds: int
    clip: float = 1.0


FORMS = {
    "tiny": Form(16, 1, 12, 6, (0.01,), 1),  # for the tests
    "short": Form(64, 3, 100, 60, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), 3),
    "unclipped": Form(64, 3, 100, 60, (0.01, 0.03, 0.1), 3, clip=math.inf),
    "long": Form(96, 4, 400, 200, (0.001, 0.003, 0.01, 0.03), 3),
}
ARMS = ("full length", "warmup")


@dataclass(frozen=True)
class Run:
    """One run of a form."""

    form: str
    arm: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """The name of its row's file."""
        return f"{self.form}-{self.arm.replace(' ', '-')}-lr{self.lr:g}-seed{self.seed}"


def build_model(form: Form, seed: int) -> GPT2LMHeadModel:
    logging.set_verbosity_error()  # it warns of a vocabulary without GPT-2's own end of text
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1024,
            n_embd=form.width,
            n_layer=form.layers,
            n_head=4,
            n_positions=LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


class Training:
    """A run's parts, and what is recorded of it."""

    def __init__(self, run: Run, text: Text) -> None:
        form = FORMS[run.form]
        self.run, self.text = run, text
        self.model = build_model(form, run.seed)
        self.tokens, self.budget = 0, form.steps * SEQUENCES * LENGTH
        self.lengths = (
            SequenceLengthWarmup(self.model, start=START, end=LENGTH, steps=form.grows) if run.arm == "warmup" else None
        )
        self.optimizer = BlockwiseAdamW(
            self.model.named_parameters(),
            lr=run.lr,
            betas=BETAS,
            weight_decay=0.01,
            block_map=map_blocks(self.model),
            block_lr_ratios="uniform",
        )
        self.schedule = BlockwiseTokenCosine(
            self.optimizer, self.budget, WARMUP, min_lr=run.lr / 20, tokens=lambda: self.tokens
        )
        self.monitor = BlockMonitor(self.optimizer, every=1, updates=False)
        self.ratio, self.ratios, self.norms, self.largest = LossRatio(), [], [], []
        self.seconds = 0.0

    def step(self, number: int) -> float:
        """One step; its training loss."""
        began = time.process_time()
        ids = self.text.batch(self.run.seed, number, SEQUENCES)[:, :LENGTH]
        self.tokens += SEQUENCES * (LENGTH if self.lengths is None else self.lengths.length)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), FORMS[self.run.form].clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.lengths is not None:
            self.lengths.step()
        self.seconds += time.process_time() - began
        self.record(float(loss.detach()))
        return float(loss.detach())

    def record(self, loss: float) -> None:
        """The loss ratio and the optimizer's variance."""
        figures = self.monitor.report() or {}
        self.ratios.append(self.ratio.add(loss))
        self.norms.append(sum(value for name, value in figures.items() if name.startswith("variance_l1/")))
        self.largest.append(max(value for name, value in figures.items() if name.startswith("variance_max/")))

    @torch.no_grad()
    def validate(self, held_out: torch.Tensor) -> float:
        """Mean loss at the full length."""
        self.model.eval()
        losses = [float(self.model(input_ids=part, labels=part).loss) for part in held_out.split(8)]
        self.model.train()
        return sum(losses) / len(losses)


def train(run: Run, text: Text) -> dict[str, Any]:
    """Trains and returns the row. Seconds are those of one core, without validation."""
    place = Place()  # one thread
    training, held_out = Training(run, text), text.held_out(HELD_OUT)[:, :LENGTH]
    curve: dict[str, list[float | None]] = {"step": [], "tokens": [], "seconds": [], "validation": []}
    number = 0
    while training.tokens < training.budget:
        loss = training.step(number)
        number += 1
        ends = training.tokens >= training.budget or not math.isfinite(loss)
        if number % VALIDATE == 0 or ends:
            found = training.validate(held_out)
            values = (number, training.tokens, round(training.seconds, 3), found if math.isfinite(found) else None)
            for key, value in zip(curve, values):
                curve[key].append(round(value, 5) if isinstance(value, float) else value)
        if ends:
            break
    return {
        "run": asdict(run),
        "steps": number,
        "final": curve["validation"][-1],
        "curve": curve,
        "spikes": training.ratio.spikes,
        "largest_ratio": round(training.ratio.largest, 4) if math.isfinite(training.ratio.largest) else None,
        "correlation": {
            "norm": _correlation(training.ratios, training.norms),
            "max": _correlation(training.ratios, training.largest),
        },
        "text": text.digest,
        "machine": machine(place),
        "versions": versions(),
        "commit": commit(),
    }


def _correlation(ratios: list[float], values: list[float]) -> float | None:
    """Pearson's, over the steps; None where it is not defined."""
    pairs = torch.tensor([ratios, values], dtype=torch.float64)
    found = float(torch.corrcoef(pairs)[0, 1]) if torch.isfinite(pairs).all() else math.nan
    return round(found, 4) if math.isfinite(found) else None
