"""One run: a network trained to certified robustness by its interval bounds, under DeepSpeed."""

from __future__ import annotations

import copy
import gc
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from bounds import bounds, box_around
from losses import figures, relu_balance, robust_loss, tightness
from network import cnn7, ibp_initialize
from torch import nn
from torch.nn import functional as F

import blockwise_lr.deepspeed  # noqa: F401  registers BlockwiseAdamW
from blockwise_lr.schedules import SmoothedEpsilon

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import alone
from images import Images
from rows import commit, machine, versions

HERE = Path(__file__).parent
SMALLEST = 1e-6  # epsilon of the regularizers' bounds while the images are not perturbed
TOLERANCE = 0.5


@dataclass(frozen=True)
class Setting:
    """What all runs of a table share. Lengths are in epochs.

    Attributes:
        channels, width, pool: see :func:`network.cnn7`.
        clean: before epsilon grows.
        grows: in which epsilon grows; the short warmup.
        milestones: behind which the learning rate is a fifth of what it was.
        weight: of the regularizers, while epsilon is 0.
        flips: whether images are mirrored and moved by up to 2 pixels.
    """

    source: str
    channels: tuple[int, ...]
    width: int
    epsilon: float
    batch: int
    epochs: int
    clean: int
    grows: int
    milestones: tuple[int, ...]
    seeds: int
    pool: int = 1
    weight: float = 0.5
    flips: bool = False


_PAPER = (64, 64, 128, 128, 128)
SETTINGS = {
    "tiny": Setting("mnist-5k", (2, 2, 4, 4, 4), 8, 0.1, 1000, 3, 1, 1, (2,), 1, pool=4),  # for the tests
    "small": Setting("mnist-5k", (8, 8, 16, 16, 16), 64, 0.1, 32, 20, 1, 8, (15, 18), 3, pool=2),
    # the paper's
    "mnist": Setting("mnist", _PAPER, 512, 0.4, 256, 70, 0, 20, (50, 60), 5),
    "cifar10": Setting("cifar10", _PAPER, 512, 8 / 255, 128, 70, 1, 20, (50, 60), 5, flips=True),
    "cifar10-long": Setting("cifar10", _PAPER, 512, 8 / 255, 128, 160, 1, 80, (120, 140), 5, flips=True),
}


@dataclass(frozen=True)
class Arm:
    """Which of the three improvements a run has."""

    norms: bool = True
    initialized: bool = True
    regularized: bool = True


ARMS = {
    "none": Arm(norms=False, initialized=False, regularized=False),
    "vanilla": Arm(initialized=False, regularized=False),  # what the paper calls vanilla IBP: with batch norms
    "initialized": Arm(regularized=False),
    "all": Arm(),
}


@dataclass(frozen=True)
class Run:
    """One run of a setting; ``ratios`` are learning rates of the blocks conv, norms and linear, over lr."""

    setting: str
    arm: str
    seed: int
    ratios: tuple[tuple[str, float], ...] = ()

    @property
    def key(self) -> str:
        """The name of its row's file."""
        ratios = "".join(f"-{block}-{ratio:g}" for block, ratio in self.ratios)
        return f"{self.setting}-{self.arm}{ratios}-seed{self.seed}"


class Certified(nn.Module):
    """A network with its losses, so that DeepSpeed's engine has one forward pass a step."""

    def __init__(self, network: nn.Sequential, regularized: bool) -> None:
        super().__init__()
        self.network, self.regularized = network, regularized

    def forward(self, images: torch.Tensor, labels: torch.Tensor, epsilon: float, weight: float) -> tuple[Any, ...]:
        """The loss, and what is recorded of the bounds.

        Args:
            images: (batch, channels, height, width).
            weight: of the regularizers.
        """
        found = bounds(self.network, box := box_around(images, max(epsilon, SMALLEST)), labels)
        loss = robust_loss(found, labels) if epsilon else F.cross_entropy(found.logits, labels)
        if self.regularized and weight:
            loss = loss + weight * (tightness(box, found.hidden, TOLERANCE) + relu_balance(found.hidden, TOLERANCE))
        return loss, partial(figures, box, found.hidden)

    @torch.no_grad()
    def errors(self, images: torch.Tensor, labels: torch.Tensor, epsilon: float) -> tuple[float, float]:
        """Shares of images that are classified wrongly, and that are not proven to be classified rightly within epsilon."""
        wrong = unproven = 0
        for part, of in zip(images.split(500), labels.split(500)):
            found = bounds(self.network, box_around(part, epsilon), of)
            wrong += int((found.logits.argmax(1) != of).sum())
            unproven += int((found.margins < 0).any(1).sum())
        return wrong / len(images), unproven / len(images)


def build(run: Run, shape: tuple[int, int, int]) -> Certified:
    """A run's fresh network."""
    of, arm = SETTINGS[run.setting], ARMS[run.arm]
    torch.manual_seed(run.seed)
    network = cnn7(shape, of.channels, of.width, pool=of.pool, norms=arm.norms)
    if arm.initialized:
        ibp_initialize(network)
    return Certified(network, arm.regularized)


def ds_config(run: Run) -> dict[str, Any]:
    """The example's ds_config for a run."""
    config, arm = json.loads((HERE / "ds_config.json").read_text()), ARMS[run.arm]
    config["train_micro_batch_size_per_gpu"] = SETTINGS[run.setting].batch
    params = config["optimizer"]["params"]
    params["block_lr_ratios"].update(dict(run.ratios))
    if not arm.norms:  # a rule that matches nothing is refused
        params["block_rules"] = [rule for rule in params["block_rules"] if rule.get("name") != "norms"]
        del params["block_lr_ratios"]["norms"]
    return config


class Training:
    """A run's engine and epsilon's schedule; saved and loaded together."""

    def __init__(self, run: Run, data: Images) -> None:
        self.run, self.of, self.data = run, SETTINGS[run.setting], data
        alone.start()
        self.steps_per_epoch = data.steps_per_epoch(self.of.batch)
        milestones = [epoch * self.steps_per_epoch for epoch in self.of.milestones]
        model = build(run, tuple(data.training.shape[1:]))
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=copy.deepcopy(ds_config(run)),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.2),
        )
        self.epsilon = SmoothedEpsilon(
            self.of.epsilon, self.of.grows * self.steps_per_epoch, self.of.clean * self.steps_per_epoch
        )

    def step(self) -> dict[str, Any]:
        """One optimizer step; its loss and a function that returns what is recorded of the bounds."""
        number, epsilon = self.epsilon.steps, self.epsilon.value
        images, labels = self.data.batch(self.run.seed, number, self.of.batch)
        images, labels = images.to(self.engine.device), labels.to(self.engine.device)
        if self.of.flips:
            images = moved(images, torch.Generator().manual_seed(self.run.seed * 1_000_003 + number))
        loss, record = self.engine(images, labels, epsilon, self.of.weight * (1 - epsilon / self.of.epsilon))
        self.engine.backward(loss)
        self.engine.step()
        self.epsilon.step()
        return {"loss": float(loss.detach()), "record": record}

    def errors(self) -> tuple[float, float]:
        """On the held-out images, at the last epsilon."""
        self.engine.eval()
        images, labels = (part.to(self.engine.device) for part in (self.data.test, self.data.test_labels))
        found = self.engine.module.errors(images, labels, self.of.epsilon)
        self.engine.train()
        return found

    def save(self, folder: Path, row: Mapping[str, Any] | None = None) -> None:
        self.engine.save_checkpoint(str(folder), client_state={"epsilon": self.epsilon.state_dict(), "row": row})

    def load(self, folder: Path) -> Any:
        """Goes on where a folder's newest checkpoint ends; what was saved of the row, or None without a checkpoint."""
        if not (folder / "latest").exists():
            return None
        _, state = self.engine.load_checkpoint(str(folder))
        self.epsilon.load_state_dict(state["epsilon"])
        return state["row"]


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images mirrored or not, and moved by up to 2 pixels, each for itself; the edge is repeated."""
    count, _, height, width = images.shape
    flips = torch.rand(count, generator=generator) < 0.5
    padded = F.pad(
        torch.where(flips.to(images.device)[:, None, None, None], images.flip(3), images), (2,) * 4, "replicate"
    )
    at = torch.randint(0, 5, (count, 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, at)])


def train(run: Run, data: Images, checkpoints: Path | None = None) -> dict[str, Any]:
    """Trains and returns the row; a run whose loss is no longer finite ends there.

    Args:
        checkpoints: saves there after every epoch, and goes on from there.
    """
    training = Training(run, data)
    curve: dict[str, Any] = {"epoch": [], "epsilon": [], "loss": [], "error": [], "verified": []}
    curve.update(growth=[], active=[], inactive=[])
    seconds = 0.0
    if checkpoints is not None and (before := training.load(checkpoints / run.key)) is not None:
        curve, seconds = before["curve"], before["seconds"]
    else:
        curve["start"] = at_the_start(training)
    for epoch in range(len(curve["epoch"]) + 1, training.of.epochs + 1):
        began, total = time.process_time(), 0.0
        for _ in range(training.steps_per_epoch):
            done = training.step()
            total += done["loss"]
        seconds += time.process_time() - began
        record, (error, verified) = done["record"](), training.errors()
        values = {"epoch": epoch, "epsilon": round(training.epsilon.value, 5), "error": error, "verified": verified}
        loss = total / training.steps_per_epoch
        for key, value in {**values, "loss": round(loss, 5) if math.isfinite(loss) else None, **record}.items():
            curve[key].append(value)
        if checkpoints is not None:
            training.save(checkpoints / run.key, {"curve": curve, "seconds": seconds})
        if not math.isfinite(loss):
            break
    training.engine.destroy()
    gc.collect()
    return {
        "run": asdict(run),
        "start": curve.pop("start"),
        "error": curve["error"][-1],
        "verified": curve["verified"][-1],
        "curve": curve,
        "parameters": sum(p.numel() for p in training.engine.module.parameters()),
        "cpu_seconds": round(seconds, 1),
        "images": data.digest,
        "machine": machine(),
        "versions": versions("torch", "numpy", "deepspeed", "blockwise-lr"),
        "commit": commit(HERE),
    }


@torch.no_grad()
def at_the_start(training: Training) -> dict[str, list[float]]:
    """What is recorded of the bounds before the first step, of a batch of the training images at the smallest epsilon."""
    images, labels = training.data.batch(training.run.seed, 0, training.of.batch)
    network = copy.deepcopy(training.engine.module.network)  # its running statistics go
    box = box_around(images.to(training.engine.device), SMALLEST)
    return figures(box, bounds(network, box, labels.to(training.engine.device)).hidden)
