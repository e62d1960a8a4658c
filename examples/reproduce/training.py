"""One training run, from its description to its row."""

from __future__ import annotations

import math
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arms import ARMS, CLIP, WARMUP, build_optimizer, learning_rate
from data import Text
from model import LENGTH, body_parameters, build_model

from blockwise_lr.schedules import BlockwiseWarmupCosine

POINTS = 40  # of a curve
MICRO = 32  # sequences of a forward pass; a batch of more is accumulated
CURVE, FINAL = 64, 512  # held-out sequences of a point of the curve, and of the final loss


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


@torch.no_grad()
def evaluate(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean loss, in nats per token, of (sequences, LENGTH + 1) token ids."""
    return sum(float(_loss(model, part)) * len(part) for part in ids.split(MICRO)) / len(ids)


def _loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(run: Run, text: Text) -> dict[str, Any]:
    """Trains and returns the row; a run whose loss is no longer finite ends there, with a final loss of None.

    Seconds are those of training without evaluation; tokens per second are by CPU seconds, which other work on the
    machine does not lengthen.
    """
    torch.set_num_threads(1)
    arm, lr, steps = ARMS[run.arm], learning_rate(run.k), run.steps
    model = build_model(run.rung, run.seed, arm.embedding_std)
    optimizer = build_optimizer(arm, model, lr)
    schedule = BlockwiseWarmupCosine(optimizer, steps, max(round(WARMUP * steps), 1), min_lr=arm.floor * lr)
    sequences = run.batch // LENGTH
    points = {round(steps * (i + 1) / POINTS) for i in range(POINTS)} - {0}
    curve: dict[str, list] = {"step": [], "training": [], "validation": []}
    losses: list[float] = []
    seconds = cpu_seconds = 0.0
    for step in range(steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        parts = text.batch(run.seed, step, sequences).split(MICRO)
        loss = 0.0
        for part in parts:
            share = _loss(model, part) / len(parts)
            share.backward()
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - cpu_began
        losses.append(loss)
        if step + 1 in points:
            curve["step"].append(step + 1)
            curve["training"].append(round(sum(losses) / len(losses), 5))
            curve["validation"].append(round(evaluate(model, text.held_out(CURVE)), 5))
            losses = []
        if not math.isfinite(loss):
            break
    final = evaluate(model, text.held_out(FINAL))
    return {
        "run": asdict(run),
        "lr": lr,
        "steps": steps,
        "tokens": steps * sequences * LENGTH,
        "final": round(final, 5) if math.isfinite(final) else None,
        "curve": {key: [value if math.isfinite(value) else None for value in values] for key, values in curve.items()},
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "tokens_per_second": round((step + 1) * sequences * LENGTH / cpu_seconds),
        "peak_memory_bytes": _peak_memory(),
        "optimizer_state_bytes": _state_bytes(optimizer),
        "text": text.digest,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def machine() -> dict[str, Any]:
    """What the run ran on; no names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {"system": platform.system(), "architecture": platform.machine(), "cpu": cpu, "threads": 1}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "transformers", "sentencepiece", "blockwise-lr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from a checkout
            found[package] = "checkout"
    return found


def commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!rows")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
