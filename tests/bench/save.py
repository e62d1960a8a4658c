"""``make bench``: saving and loading a checkpoint through DeepSpeed, its own AdamW and ours side by side in one process.

One rank, a LLaMA of 34M parameters, ZeRO-1 in fp32, one engine per optimizer. Rounds are interleaved and begin with
another arm each; the disk is idle at the start of each measurement (sync) and files are read from the page cache. Ours
bring files to disk (fsync) and write or compare checksums within the time; DeepSpeed's own do neither. Ratios are the
medians over rounds of an arm's seconds over the base arm's in the same round, with quartiles, those of the least
seconds, and of the processors' seconds, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE = "DeepSpeed AdamW"
ARMS = {
    BASE: {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True}},
    "BlockwiseAdamW": {"type": "BlockwiseAdamW", "params": {"lr": 1e-4}},
    "BlockwiseAdamMini": {"type": "BlockwiseAdamMini", "params": {"lr": 1e-4}},
}


def engines(stage: int, dtype: str) -> dict[str, Any]:
    """An engine per arm, after one step."""
    import deepspeed
    import torch
    import transformers

    import blockwise_lr.deepspeed  # noqa: F401

    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    found = {}
    for name, optimizer in ARMS.items():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=512,
                intermediate_size=1376,
                num_hidden_layers=8,
                num_attention_heads=8,
                num_key_value_heads=4,
                vocab_size=8192,
                max_position_embeddings=64,
            )
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": optimizer,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
            **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
        }
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
        ids = torch.randint(0, 8192, (1, 16))
        engine.backward(engine(ids, labels=ids).loss)
        engine.step()
        found[name] = engine
    return found


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of the processors."""
    os.sync()
    began, used = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - used


Times = dict[str, list[tuple[float, float]]]


def measure(found: dict[str, Any], rounds: int, folder: Path) -> tuple[Times, Times]:
    """Seconds of every arm's save and load in every round."""
    saves: Times = {name: [] for name in found}
    loads: Times = {name: [] for name in found}
    order = list(found.items())
    for number in range(rounds + 1):
        order = order[1:] + order[:1]
        for name, engine in order:
            place = folder / name
            shutil.rmtree(place, ignore_errors=True)
            seconds = (
                timed(lambda: engine.save_checkpoint(str(place), tag="a")),
                timed(lambda: engine.load_checkpoint(str(place), tag="a")),
            )
            if number:  # the first warms up
                saves[name].append(seconds[0])
                loads[name].append(seconds[1])
    return saves, loads


def summary(saves: Times, loads: Times, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """One entry per arm and direction: median and least seconds, their ratios to the base arm, quartiles, the ratio of
    the processors' seconds, bytes."""
    found = []
    for what, times in (("save", saves), ("load", loads)):
        for name, both in times.items():
            seconds, least = [wall for wall, _ in both], min(wall for wall, _ in times[BASE])
            ratios, cpu = ([own[i] / base[i] for own, base in zip(both, times[BASE])] for i in (0, 1))
            low, middle, high = statistics.quantiles(ratios, n=4)
            found.append(
                {
                    "what": what,
                    "arm": name,
                    "seconds": statistics.median(seconds),
                    "ratio": middle,
                    "quartiles": [low, high],
                    "least": min(seconds),
                    "least_ratio": min(seconds) / least,
                    "cpu_ratio": statistics.median(cpu),
                    "MB": sizes[name] / 1e6,
                    "size_ratio": sizes[name] / sizes[BASE],
                }
            )
    return found


def show(entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"checkpoints of 34M parameters, one rank; ratios to {BASE}")
    table.add_column("", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    for column in ("seconds", "ratio", "quartiles", "least", "ratio", "CPU ratio", "MB", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for e in entries:
        low, high = e["quartiles"]
        table.add_row(
            e["what"],
            e["arm"],
            f"{e['seconds']:.2f}",
            f"{e['ratio']:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{e['least']:.2f}",
            f"{e['least_ratio']:.2f}",
            f"{e['cpu_ratio']:.2f}",
            f"{e['MB']:.0f}",
            f"{e['size_ratio']:.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_save.json"))
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }.items():
        os.environ.setdefault(key, value)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = engines(args.stage, args.dtype)
        saves, loads = measure(found, args.rounds, Path(folder))
        sizes = {
            name: sum(path.stat().st_size for path in (Path(folder) / name / "a").rglob("*") if path.is_file())
            for name in found
        }
    entries = summary(saves, loads, sizes)
    show(entries)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(entries, indent=1))
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
