"""``make bench``: a step over a model's parameters one by one, as plain PyTorch has them, where flat shards are rare.

The models are GPT-2 124M and LLaMA 0.25B of configs/models, in float32. Rounds and ratios as in step.py.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from step import BASE, LION, SETTINGS, measure, show, summary
from transformers import AutoConfig, AutoModelForCausalLM

from blockwise_lr import map_blocks
from blockwise_lr.kernels import kernel_for
from blockwise_lr.optim import CLASSES

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


def build(name: str, device: torch.device) -> torch.nn.Module:
    """The model of a config, with random weights and gradients."""
    config = AutoConfig.for_model(**json.loads((MODELS / f"{name}.json").read_text()))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def arms(model: torch.nn.Module, device: torch.device) -> dict[str, Callable[[], None]]:
    """Arm -> one step of it over the model's parameters."""
    named, block_map = list(model.named_parameters()), map_blocks(model)
    made: dict[str, torch.optim.Optimizer] = {
        BASE: torch.optim.AdamW([p for _, p in named], fused=True, **SETTINGS),
        "torch foreach AdamW": torch.optim.AdamW([p for _, p in named], foreach=True, **SETTINGS),
    }
    for kind, optimizer in CLASSES.items():
        made[kind] = optimizer(named, block_map=block_map, **(LION if "Lion" in kind else SETTINGS))
    found: dict[str, Callable[[], None]] = {name: optimizer.step for name, optimizer in made.items()}
    total = torch.empty(sum(p.numel() for _, p in named), device=device)
    found["triad"] = functools.partial(torch.add, total, total, alpha=0.5, out=torch.empty_like(total))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2-124m", "llama-0.25b"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, default=Path("runs/bench-parameters.json"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120)
    console.print(f"kernel: {kernel_for(device).name} on {device}, torch {torch.__version__}")
    entries = []
    for name in args.models:
        model = build(name, device)
        numel = sum(p.numel() for p in model.parameters())
        found = summary(numel, *measure(arms(model, device), args.rounds, device, name))
        entries += [{"model": name, "tensors": len(list(model.parameters())), **entry} for entry in found]
        console.print(f"{name}, {len(list(model.parameters()))} parameters:")
        show(found, console)
        del model
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(entries, indent=1))
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
