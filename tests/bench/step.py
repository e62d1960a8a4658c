"""``make bench``: one optimizer step of ours and of its peers, side by side in one process.

All arms step a flat float32 shard of a LLaMA-shaped model with fused QKV (the official Adam-mini: the same model's tensors,
split as it needs them). Rounds are interleaved, so that a machine that slows down slows all arms; every figure is the
median over rounds of an arm's time over the base arm's time in the same round, with its quartiles.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW
from blockwise_lr.blocks import BlockMap, BlockType, ParamLayout, Piece
from blockwise_lr.kernels import kernel_for
from blockwise_lr.optim import Fragment, ShardMap

HIDDEN, HEADS, KV_HEADS, FFN, VOCABULARY = 1024, 16, 4, 2816, 8192
HEAD = HIDDEN // HEADS
BASE = "torch fused AdamW"
BYTES = {"AdamW": 28, "Adam-mini": 20}  # per element: read p, g, m (v), write p, m (v)
SETTINGS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def layouts(numel: int) -> list[ParamLayout]:
    """A LLaMA-shaped model of about that many parameters, in the order a buffer holds them."""
    q, k, v = (Piece(BlockType.QK, HEADS // KV_HEADS * HEAD, HEAD), Piece(BlockType.QK, HEAD, HEAD),
               Piece(BlockType.VO, HEAD, 1))
    found = [ParamLayout("embedding", (VOCABULARY, HIDDEN), (Piece(BlockType.EMBEDDING, VOCABULARY),))]
    while sum(layout.numel for layout in found) < numel:
        layer = f"layers.{len(found) // 6}"
        found += [
            ParamLayout(f"{layer}.qkv", ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN), (q, k, v), repeat=KV_HEADS),
            ParamLayout(f"{layer}.o_proj", (HIDDEN, HIDDEN), (Piece(BlockType.VO, HIDDEN),)),
            ParamLayout(f"{layer}.gate_up", (2 * FFN, HIDDEN), (Piece(BlockType.FFN, 2 * FFN),)),
            ParamLayout(f"{layer}.down", (HIDDEN, FFN), (Piece(BlockType.FFN, HIDDEN),)),
            ParamLayout(f"{layer}.norm1", (HIDDEN,), (Piece(BlockType.NORM, HIDDEN, 0),), kind="norm"),
            ParamLayout(f"{layer}.norm2", (HIDDEN,), (Piece(BlockType.NORM, HIDDEN, 0),), kind="norm"),
        ]
    return found


def ours(kind: type, flat: torch.Tensor, model: list[ParamLayout]) -> Callable[[], None]:
    """A step of our optimizer on the flat tensor."""
    block_map = BlockMap(model)
    block_map.bind([(model[0].name, flat)])
    optimizer = kind([flat], block_map=block_map, **SETTINGS)
    fragments, offset = [], 0
    for layout in model:
        held = min(layout.numel, flat.numel() - offset)
        if held > 0:
            fragments.append(Fragment(layout.name, 0, held, offset))
        offset += layout.numel
    optimizer.attach_shards(ShardMap([(flat, fragments)]))
    return optimizer.step


def official(flat: torch.Tensor, model: list[ParamLayout]) -> Callable[[], None]:
    """A step of the official Adam-mini on the model's tensors, q, k and v split as it needs them."""
    from adam_mini import Adam_mini

    named, offset = [], 0
    for layout in model:
        if offset + layout.numel > flat.numel():
            break
        values = flat.data[offset:offset + layout.numel].view(layout.shape)
        grads = flat.grad[offset:offset + layout.numel].view(layout.shape)
        sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD] if layout.name.endswith("qkv") else [layout.shape[0]]
        names = (["q_proj", "k_proj", "v_proj"] if len(sizes) == 3 else
                 [layout.name.replace("gate_up", "mlp").replace("down", "mlp_down").replace("embedding", "embed")])
        for name, value, grad in zip(names, values.split(sizes), grads.split(sizes)):
            p = torch.nn.Parameter(value)
            p.grad = grad
            named.append((f"{layout.name}.{name}" if len(sizes) == 3 else name, p))
        offset += layout.numel
    return Adam_mini(named, dim=HIDDEN, n_heads=HEADS, n_kv_heads=KV_HEADS, verbose=False, **SETTINGS).step


def arms(numel: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Arm -> one step of it. Arms share parameters and gradients, so a size fits the memory; states are their own."""
    model = layouts(numel)
    flat = torch.nn.Parameter(torch.randn(numel, device=device))
    flat.grad = torch.randn(numel, device=device)
    found: dict[str, Callable[[], None]] = {
        BASE: torch.optim.AdamW([flat], fused=True, **SETTINGS).step,
        "BlockwiseAdamW": ours(BlockwiseAdamW, flat, model),
        "BlockwiseAdamMini": ours(BlockwiseAdamMini, flat, model),
    }
    if numel <= 120_000_000:
        found["torch foreach AdamW"] = torch.optim.AdamW([flat], foreach=True, **SETTINGS).step
        found["official adam-mini"] = official(flat, model)
    found.update(_deepspeed(flat))
    a, b, c = (torch.randn(numel, device=device) for _ in range(3))
    found["triad"] = lambda: torch.add(b, c, alpha=0.5, out=a)
    found["copy"] = lambda: a.copy_(b)
    return found


def _deepspeed(flat: torch.Tensor) -> dict[str, Callable[[], None]]:
    """DeepSpeed's optimizer for the device, where it is installed and builds."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    except ImportError:
        return {}
    try:
        if flat.is_cuda:
            return {"DeepSpeed FusedAdam": FusedAdam([flat], **SETTINGS).step}
        return {"DeepSpeedCPUAdam": DeepSpeedCPUAdam([flat], adamw_mode=True, **SETTINGS).step}
    except Exception as error:
        print(f"DeepSpeed's optimizer is left out: {error}")
        return {}


def measure(numel: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every arm in every round."""
    found = arms(numel, device)
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in track(range(rounds + 2), description=f"{numel / 1e6:.0f}M elements", transient=True):
        for name, step in found.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def _bytes_per_element(name: str) -> int:
    if name in ("triad", "copy"):
        return {"triad": 12, "copy": 8}[name]
    return BYTES["Adam-mini" if "ini" in name else "AdamW"]


def summary(numel: int, times: dict[str, list[float]]) -> list[dict]:
    """One entry per arm: median milliseconds, ratio to the base arm with quartiles, GB/s, share of triad's GB/s."""
    rates = {name: numel * _bytes_per_element(name) / statistics.median(t) / 1e9 for name, t in times.items()}
    entries = []
    for name, seconds in times.items():
        ratios = sorted(t / base for t, base in zip(seconds, times[BASE]))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        share = statistics.median([numel * _bytes_per_element(name) / t / (numel * 12 / triad)
                                   for t, triad in zip(seconds, times["triad"])])
        entries.append({"elements": numel, "arm": name, "ms": statistics.median(seconds) * 1e3, "ratio": middle,
                        "quartiles": [low, high], "GB_per_s": rates[name], "of_triad": share})
    return entries


def show(entries: list[dict], console: Console) -> None:
    table = Table(title=f"{entries[0]['elements'] / 1e6:.0f}M float32 elements, {torch.get_num_threads()} threads")
    table.add_column("arm", no_wrap=True)
    for column in ("ms", f"ratio to {BASE}", "quartiles", "GB/s", "of triad"):
        table.add_column(column, justify="right", no_wrap=True)
    for e in entries:
        table.add_row(e["arm"], f"{e['ms']:.1f}", f"{e['ratio']:.3f}", f"{e['quartiles'][0]:.3f}–{e['quartiles'][1]:.3f}",
                      f"{e['GB_per_s']:.1f}", f"{e['of_triad']:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 1e8, 4e8], help="elements of the shard")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=110)
    console.print(f"kernel: {kernel_for(device).name} on {device}, torch {torch.__version__}")
    entries = []
    for size in args.sizes:
        entries += summary(int(size), measure(int(size), args.rounds if size <= 2e8 else args.rounds // 3, device))
        show([e for e in entries if e["elements"] == int(size)], console)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(entries, indent=1))
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
