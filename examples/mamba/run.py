"""A small Mamba of transformers, in plain PyTorch, with one learning rate and with the paper's ratios.

python examples/mamba/run.py             # trains what runs/mamba lacks, and prints a table
python examples/mamba/run.py --report    # only the table of README.md, from rows/

Its mixers are blocks of type ssm, which follow the ffn's ratio; the paper tried no such model.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

from blockwise_lr import BlockwiseAdamW, map_blocks
from blockwise_lr.schedules import BlockwiseWarmupCosine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rows import Rows, commit, fill, load_rows, machine, table, versions, write_page

HERE = Path(__file__).parent
STEPS, BATCH, LENGTH, EVERY = 100, 16, 64, 20
ARMS = {"uniform": (2e-3,), "paper": (3e-4,)}  # preset of ratios -> learning rates


@dataclass(frozen=True)
class Run:
    """One run; ``arm`` is a preset of ratios."""

    arm: str
    lr: float
    steps: int

    @property
    def key(self) -> str:
        """The name of its row's file."""
        return f"{self.arm}-lr{self.lr:g}-steps{self.steps}"


def build_model(seed: int = 0) -> MambaForCausalLM:
    """Two layers of width 64 on bytes."""
    torch.manual_seed(seed)
    return MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8))


def text() -> torch.Tensor:
    """The modules of Python's standard library, as bytes; the last twentieth is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def windows(data: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count, LENGTH) bytes from random places."""
    starts = torch.randint(0, len(data) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + LENGTH] for start in starts]).long()


def train(run: Run, data: torch.Tensor) -> dict:
    """Trains and returns the row."""
    logging.set_verbosity_error()  # it says that the fused kernels are not installed
    cut = len(data) * 19 // 20
    held_out, model = windows(data[cut:], 128, 0), build_model()
    block_map = map_blocks(model)
    optimizer = BlockwiseAdamW(model.named_parameters(), lr=run.lr, block_map=block_map, block_lr_ratios=run.arm)
    schedule = BlockwiseWarmupCosine(optimizer, run.steps, max(run.steps // 10, 1))
    curve: dict[str, list] = {"step": [], "validation": []}
    began = time.process_time()
    for step in range(1, run.steps + 1):
        ids = windows(data[:cut], BATCH, step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVERY == 0 or step == run.steps:
            with torch.no_grad():
                loss = float(model(input_ids=held_out, labels=held_out).loss)
            curve["step"].append(step)
            curve["validation"].append(round(loss, 4) if math.isfinite(loss) else None)
    return {
        "run": asdict(run),
        "final": curve["validation"][-1],
        "curve": curve,
        "parameters": {block.value: numel for block, numel in block_map.block_numel().items()},
        "cpu_seconds": round(time.process_time() - began, 1),
        "machine": machine(),
        "versions": versions("torch", "transformers", "blockwise-lr"),
        "commit": commit(HERE),
    }


def losses(rows: Rows) -> str:
    """Validation loss of every run."""
    lines = [["ratios", "lr", "validation loss", "CPU seconds"]]
    for row in sorted(rows.values(), key=lambda row: (list(ARMS).index(row["run"]["arm"]), row["run"]["lr"])):
        final = "diverged" if row["final"] is None else f"{row['final']:.3f}"
        lines.append([row["run"]["arm"], f"{row['run']['lr']:g}", final, f"{row['cpu_seconds']:.0f}"])
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "mamba", help="folder of the rows")
    parser.add_argument("--report", action="store_true", help="only the table of README.md, from rows/")
    args = parser.parse_args()
    if args.report:
        write_page(HERE / "README.md", {"losses": losses(load_rows(HERE / "rows"))})
        return
    torch.set_num_threads(1)
    data = text()
    runs = [Run(arm, lr, args.steps) for arm, lrs in ARMS.items() for lr in lrs]
    fill(lambda rows: runs, lambda run: train(run, data), args.out)
    print(losses(load_rows(args.out)))


if __name__ == "__main__":
    main()
