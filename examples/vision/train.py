"""One run: a small vision transformer of transformers, trained under DeepSpeed by one of the optimizers."""

from __future__ import annotations

import copy
import gc
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import blockwise_lr.deepspeed  # noqa: F401  registers the optimizers' and schedules' types
from blockwise_lr import map_blocks
from blockwise_lr.measure import measure_sharpness, measure_updates, snapshot

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import alone
from images import Images
from rows import commit, machine, versions

HERE = Path(__file__).parent
POINTS = 10  # of a curve
MEASURED_AT = (0.1, 0.3, 0.6, 0.9)  # shares of a run
DRAWS, MEASURED = 8, (4, 100)  # of labels; batches and images of one, of the held-out ones


@dataclass(frozen=True)
class Setting:
    """What all runs of a table share.

    Attributes:
        patch: height and width of a patch, in pixels.
        trials: learning rates that each arm tries, a factor of 2 apart.
    """

    width: int
    layers: int
    heads: int
    patch: int
    batch: int
    steps: int
    trials: int
    seeds: int


SETTINGS = {
    "tiny": Setting(16, 1, 2, 14, 50, 6, 1, 1),  # for the tests
    "small": Setting(48, 3, 4, 7, 50, 300, 4, 3),
}
# an optimizer's type in a ds_config, the middle of its learning rates, and further options
ARMS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("AdamW", 2e-3, {}),
    "blockwise": ("BlockwiseAdamW", 3.2e-4, {"block_lr_ratios": "paper"}),
    "mini": ("BlockwiseAdamMini", 3.2e-4, {"block_lr_ratios": "paper"}),
    # what sharpness says here: both ends of the model are the sharpest blocks, so their ratio is the norms'
    "sharp-ends": ("BlockwiseAdamW", 3.2e-4, {"block_lr_ratios": {"preset": "paper", "embedding": 1, "head": 1}}),
    "muon": ("BlockwiseMuon", 2e-3, {}),  # q, k, v, output and FFN by Muon, the rest by AdamW; its own default ratios
}


def learning_rates(setting: str, arm: str) -> list[float]:
    """What an arm tries."""
    trials = SETTINGS[setting].trials
    return [float(f"{ARMS[arm][1] * 2 ** (number - trials // 2):.3g}") for number in range(trials)]


@dataclass(frozen=True)
class Run:
    """One run of a setting."""

    setting: str
    arm: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """The name of its row's file."""
        return f"{self.setting}-{self.arm}-lr{self.lr:g}-seed{self.seed}"


class Classifier(torch.nn.Module):
    """A vision transformer with its loss."""

    def __init__(self, of: Setting) -> None:
        super().__init__()
        self.vit = ViTForImageClassification(
            ViTConfig(
                hidden_size=of.width,
                num_hidden_layers=of.layers,
                num_attention_heads=of.heads,
                intermediate_size=4 * of.width,
                image_size=28,
                patch_size=of.patch,
                num_channels=1,
                num_labels=10,
            )
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.vit(images).logits, labels)


def predictions(model: Classifier, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, as the measuring tools take them."""
    return model.vit(batch[0]).logits, batch[1]


def ds_config(run: Run) -> dict[str, Any]:
    """The example's ds_config for a run; everything but optimizer and learning rate is the same for all arms."""
    config, of = json.loads((HERE / "ds_config.json").read_text()), SETTINGS[run.setting]
    config["train_micro_batch_size_per_gpu"] = of.batch
    kind, _, options = ARMS[run.arm]
    config["optimizer"]["type"] = kind
    config["optimizer"]["params"].update(lr=run.lr, **options)
    if kind == "AdamW":
        config["optimizer"]["params"]["torch_adam"] = True
    config["scheduler"]["params"].update(total_num_steps=of.steps, warmup_num_steps=max(of.steps // 10, 1))
    return config


class Training:
    """A run's engine, what it trains on, and what is measured on the way."""

    def __init__(self, run: Run, data: Images) -> None:
        self.run, self.of, self.data, self.done, self.seconds = run, SETTINGS[run.setting], data, 0, 0.0
        alone.start()
        torch.manual_seed(run.seed)
        self.model = Classifier(self.of)
        groups = [  # as BlockwiseAdamW does by default, AdamW leaves norms and biases undecayed
            {"params": [p for p in self.model.parameters() if p.dim() > 1]},
            {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        plain = ARMS[run.arm][0] == "AdamW"
        self.engine, *_ = deepspeed.initialize(
            model=self.model, config=copy.deepcopy(ds_config(run)), model_parameters=groups if plain else None
        )
        self.block_map = map_blocks(self.model)
        count, size = MEASURED
        self.unseen = list(zip(data.test.split(size), data.test_labels.split(size)))[:count]

    def until(self, end: int) -> float:
        """Steps until ``end`` are done; their mean loss."""
        began, total = time.process_time(), 0.0
        for number in range(self.done, end):
            loss = self.engine(*self.data.batch(self.run.seed, number, self.of.batch))
            self.engine.backward(loss)
            self.engine.step()
            total += float(loss.detach())
        steps, self.done = end - self.done, end
        self.seconds += time.process_time() - began
        return total / steps

    def measure(self) -> dict[str, Any]:
        """Sharpness of every block type, and what the next step, which is taken, does along each one's update."""
        sharp = measure_sharpness(
            self.model, self.unseen, block_map=self.block_map, draws=DRAWS, predictions=predictions
        )
        before, step = snapshot(self.model), self.done
        self.until(step + 1)
        updates = measure_updates(self.model, before, self.unseen, block_map=self.block_map, predictions=predictions)
        factors = {block.value: [float(f"{x:.3g}") for x in found] for block, found in updates.multipliers().items()}
        return {"step": step, "sharpness": sharp.as_dict(), "factors": factors}

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss and share of wrong answers on the held-out images."""
        self.engine.eval()
        logits = torch.cat([self.model.vit(part).logits for part in self.data.test.split(500)])
        self.engine.train()
        labels = self.data.test_labels
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) != labels).float().mean())


def train(run: Run, data: Images, measure: bool = False) -> dict[str, Any]:
    """Trains and returns the row; a run whose loss is no longer finite ends there.

    Args:
        measure: sharpness and updates on the way, which do not change what is trained.
    """
    training = Training(run, data)
    steps = training.of.steps
    at = {max(round(share * steps), 1) for share in MEASURED_AT} if measure else set()
    ends = {max(round(steps * (number + 1) / POINTS), 1) for number in range(POINTS)}
    curve: dict[str, list] = {"step": [], "training": [], "validation": [], "error": []}
    measured = []
    for end in sorted(ends | at):
        loss = training.until(end) if end > training.done else math.nan
        if end in ends:
            validation, error = training.validate()
            values = (end, loss, validation, error)
            for key, value in zip(curve, values):
                curve[key].append(round(value, 5) if math.isfinite(value) else None)
            if curve["training"][-1] is None and not math.isfinite(validation):
                break
        if end in at and end < steps:
            measured.append(training.measure())
    training.engine.destroy()
    gc.collect()
    return {
        "run": asdict(run),
        "final": curve["validation"][-1],
        "error": curve["error"][-1],
        "curve": curve,
        **({"measured": measured} if measured else {}),
        "parameters": {block.value: numel for block, numel in training.block_map.block_numel().items()},
        "cpu_seconds": round(training.seconds, 1),
        "images": data.digest,
        "machine": machine(),
        "versions": versions("torch", "numpy", "transformers", "deepspeed", "blockwise-lr"),
        "commit": commit(HERE),
    }
