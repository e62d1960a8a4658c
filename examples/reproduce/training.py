"""One training run, from its description to its row."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arms import ARMS, CLIP, build_optimizer, learning_rate
from data import Text
from model import body_parameters, build_model

from blockwise_lr.measure import AutoRatios
from blockwise_lr.schedules import BlockwiseWarmupCosine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rows

HERE = Path(__file__).parent
POINTS = 40  # of a curve
MICRO = {"cpu": 4_096, "cuda": 65_536}  # tokens of a forward pass; a batch of more is accumulated
MEASURED = 8_192  # tokens that AutoRatios measures on, of the training text in an order that the run does not follow
CURVE, FINAL = 8_192, 65_536  # held-out tokens of a point of the curve, and of the final loss


@dataclass(frozen=True)
class Run:
    """One run. ``batch`` is in tokens, ``k`` counts half octaves of learning rate from 1e-3."""

    rung: str
    tokens_per_parameter: float
    batch: int
    arm: str
    k: int
    seed: int

    @property
    def cell(self) -> str:
        """What arms are compared in: 0.3M-5tpp-16k."""
        return f"{self.rung}-{self.tokens_per_parameter:g}tpp-{self.batch // 1024}k"

    @property
    def key(self) -> str:
        """The run's name, and that of its row's file."""
        return f"{self.cell}-{self.arm}-lr{learning_rate(self.k):g}-seed{self.seed}"

    @property
    def steps(self) -> int:
        tokens = self.tokens_per_parameter * body_parameters(self.rung) * ARMS[self.arm].length
        return max(round(tokens / self.batch), 1)


class Place:
    """Where runs train: one CPU thread in float32, or a CUDA device in bfloat16 autocast, compiled."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.loss = torch.compile(self.eager_loss) if self.cuda else self.eager_loss
        self._models: dict[str, torch.nn.Module] = {}
        if not self.cuda:
            torch.set_num_threads(1)

    def model(self, run: Run) -> torch.nn.Module:
        """The run's fresh model; on CUDA one per rung with fresh weights, so that it is compiled once."""
        fresh = build_model(run.rung, run.seed, ARMS[run.arm].embedding_std)
        if not self.cuda:
            return fresh
        if run.rung not in self._models:
            self._models[run.rung] = fresh.to(self.device)
            return fresh
        model = self._models[run.rung]
        model.load_state_dict(fresh.state_dict())
        model.zero_grad()
        return model

    def eager_loss(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of (sequences, length + 1) token ids."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            logits = model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def parts(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A batch as forward passes take it, on the device."""
        return ids.to(self.device).split(max(MICRO[self.device.type] // (ids.shape[1] - 1), 1))

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, ids: torch.Tensor) -> float:
        """Mean loss, in nats per token, of (sequences, length + 1) token ids."""
        return sum(float(self.eager_loss(model, part)) * len(part) for part in self.parts(ids)) / len(ids)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> int:
        """Bytes: what PyTorch held on the device, or the whole process on the CPU."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Training:
    """A run's model, optimizer and schedule, and how long their steps took."""

    def __init__(self, run: Run, text: Text, place: Place) -> None:
        self.run, self.text, self.place = run, text, place
        arm, lr = ARMS[run.arm], learning_rate(run.k)
        self.model = place.model(run)
        self.optimizer = build_optimizer(arm, self.model, lr)
        warmup = max(round(arm.warmup * run.steps), 1)
        self.schedule = BlockwiseWarmupCosine(self.optimizer, run.steps, warmup, min_lr=arm.floor * lr)
        self.sequences = run.batch // text.length
        at = {max(round(share * run.steps), 1) for share in arm.auto_at}
        self.auto = AutoRatios(self.model, self.optimizer, self._unseen, at, predictions=predictions) if at else None
        self.done = 0
        self.seconds = self.cpu_seconds = self.first_seconds = 0.0
        self.first = 0  # steps until the first point, which hold the compilation

    def until(self, end: int) -> float:
        """Steps until ``end`` are done; their mean training loss."""
        began, cpu_began, total = time.perf_counter(), time.process_time(), torch.zeros((), device=self.place.device)
        steps = end - self.done
        for number in range(self.done, end):
            total += self._step(number)
        self.done = end
        self.place.wait()
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began
        if not self.first:
            self.first, self.first_seconds = steps, self.seconds
        return float(total) / steps

    def _step(self, number: int) -> torch.Tensor:
        parts = self.place.parts(self.text.batch(self.run.seed, number, self.sequences))
        loss = torch.zeros((), device=self.place.device)
        for part in parts:
            share = self.place.loss(self.model, part) / len(parts)
            share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        (self.auto or self.optimizer).step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss

    def _unseen(self) -> tuple[torch.Tensor, ...]:
        """What AutoRatios measures on next."""
        order = self.run.seed + 1_000_000
        return self.place.parts(self.text.batch(order, self.done, MEASURED // self.text.length))

    def found_ratios(self) -> dict[str, dict[str, float]]:
        """Step -> block type -> ratio, as AutoRatios has set them."""
        history = self.auto.history if self.auto else ()
        return {
            str(step): {block.value: round(ratios[block], 4) for block in updates.blocks}
            for step, updates, ratios in history
        }

    def tokens_per_second(self) -> int:
        """On the CPU by CPU seconds, which other work on the machine does not lengthen; on CUDA by the clock, without
        the steps until the first point of the curve."""
        tokens = self.sequences * self.text.length
        if not self.place.cuda:
            return round(self.done * tokens / self.cpu_seconds)
        return round((self.done - self.first) * tokens / max(self.seconds - self.first_seconds, 1e-9))


def predictions(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of (sequences, length + 1) token ids."""
    return model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()


def train(run: Run, text: Text, place: Place) -> dict[str, Any]:
    """Trains and returns the row; a run whose loss is no longer finite ends there, with a final loss of None.

    Seconds are those of training without evaluation.
    """
    place.forget_peak()
    steps, length = run.steps, text.length
    training = Training(run, text, place)
    curve: dict[str, list] = {"step": [], "training": [], "validation": []}
    for end in sorted({round(steps * (i + 1) / POINTS) for i in range(POINTS)} - {0}):
        loss = training.until(end)
        curve["step"].append(end)
        curve["training"].append(round(loss, 5))
        curve["validation"].append(round(place.evaluate(training.model, text.held_out(CURVE // length)), 5))
        if not math.isfinite(loss):
            break
    final = place.evaluate(training.model, text.held_out(FINAL // length))
    return {
        "run": asdict(run),
        "lr": learning_rate(run.k),
        "steps": steps,
        "tokens": steps * training.sequences * length,
        "final": round(final, 5) if math.isfinite(final) else None,
        "curve": {key: [value if math.isfinite(value) else None for value in values] for key, values in curve.items()},
        "seconds": round(training.seconds, 2),
        "cpu_seconds": round(training.cpu_seconds, 2),
        "tokens_per_second": training.tokens_per_second(),
        "peak_memory_bytes": place.peak_memory(),
        "optimizer_state_bytes": _state_bytes(training.optimizer),
        **({"ratios": found} if (found := training.found_ratios()) else {}),
        "text": text.digest,
        "machine": machine(place),
        "versions": versions(),
        "commit": commit(),
    }


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def machine(place: Place) -> dict[str, Any]:
    """What the run ran on; no names."""
    found = {**rows.machine(), "threads": 1}
    return {**found, "gpu": torch.cuda.get_device_name(), "precision": "bfloat16 autocast"} if place.cuda else found


def versions() -> dict[str, str]:
    return rows.versions("torch", "numpy", "transformers", "sentencepiece", "blockwise-lr")


def commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it."""
    return rows.commit(HERE)
