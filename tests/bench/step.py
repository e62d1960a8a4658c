"""``make bench``: one optimizer step of ours and of its peers, side by side in one process.

All arms step a flat float32 shard of a LLaMA-shaped model with fused QKV (the official Adam-mini: the same model's
tensors, split as it needs them). Rounds are interleaved and begin with another arm each, so that a machine that slows
down slows all arms; every ratio is the median over rounds of an arm's time over the base arm's time in the same round,
with its quartiles. Arms share parameters, gradients and moments, so they touch the same memory; our optimizers have put
it on huge pages, for all arms (BLOCKWISE_LR_HUGE_PAGES=0 shows the difference). ``--before CHECKOUT`` steps the optimizers
of another checkout too (``git worktree add /tmp/before HEAD~1``), in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import blockwise_lr.blocks
from blockwise_lr.blocks import ParamLayout
from blockwise_lr.kernels import kernel_for
from blockwise_lr.kernels.huge_pages import use_huge_pages
from blockwise_lr.optim import CLASSES

HIDDEN, HEADS, KV_HEADS, FFN, VOCABULARY = 1024, 16, 4, 2816, 8192
HEAD = HIDDEN // HEADS
BASE = "torch fused AdamW"
BYTES = {"AdamW": 28, "Adam-mini and Lion": 20}  # per element: read p, g, m (v), write p, m (v)
SETTINGS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
LION = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)


def layouts(numel: int, blocks: Any = blockwise_lr.blocks) -> list[ParamLayout]:
    """A LLaMA-shaped model of about that many parameters, in the order a buffer holds them."""
    BlockType, ParamLayout, Piece = blocks.BlockType, blocks.ParamLayout, blocks.Piece
    q, k, v = (
        Piece(BlockType.QK, HEADS // KV_HEADS * HEAD, HEAD),
        Piece(BlockType.QK, HEAD, HEAD),
        Piece(BlockType.VO, HEAD, 1),
    )
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


def ours(kind: str, flat: torch.Tensor, numel: int, package: str = "blockwise_lr") -> torch.optim.Optimizer:
    """Our optimizer on the flat tensor, of this version or of another that is imported under another name."""
    blocks, optim = (importlib.import_module(f"{package}.{name}") for name in ("blocks", "optim"))
    model = layouts(numel, blocks)
    block_map = blocks.BlockMap(model)
    parameter = torch.nn.Parameter(torch.empty(model[0].shape, device="meta"))
    block_map.bind([(model[0].name, parameter)])
    optimizer = getattr(optim, kind)([parameter], block_map=block_map, **(LION if "Lion" in kind else SETTINGS))
    optimizer.param_groups[0]["params"] = [flat]  # as a framework does that has flattened its parameters
    fragments, offset = [], 0
    for layout in model:
        held = min(layout.numel, flat.numel() - offset)
        if held > 0:
            fragments.append(optim.Fragment(layout.name, 0, held, offset))
        offset += layout.numel
    optimizer.attach_shards(optim.ShardMap([(flat, fragments)]))
    return optimizer


def import_before(checkout: Path) -> str:
    """Imports the package of another checkout under a name of its own, which is returned."""
    name, folder = "blockwise_lr_before", checkout / "integrations" / "blockwise_lr"
    found = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if found is None or found.loader is None:
        raise SystemExit(f"error: {checkout} is no checkout of this project; name one with --before")
    sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules[name])
    return name


def official(flat: torch.Tensor, model: list[ParamLayout]) -> Callable[[], None] | None:
    """A step of the official Adam-mini on those of the model's tensors that lie in the shard whole, q, k and v split as
    it needs them; None where they are less than nine tenths of the shard."""
    from adam_mini import Adam_mini

    named, offset = [], 0
    for layout in model:
        if offset + layout.numel > flat.numel():
            break
        values = flat.data[offset : offset + layout.numel].view(layout.shape)
        grads = flat.grad[offset : offset + layout.numel].view(layout.shape)
        sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD] if layout.name.endswith("qkv") else [layout.shape[0]]
        names = (
            ["q_proj", "k_proj", "v_proj"]
            if len(sizes) == 3
            else [layout.name.replace("gate_up", "mlp").replace("down", "mlp_down").replace("embedding", "embed")]
        )
        for name, value, grad in zip(names, values.split(sizes), grads.split(sizes)):
            p = torch.nn.Parameter(value)
            p.grad = grad
            named.append((f"{layout.name}.{name}" if len(sizes) == 3 else name, p))
        offset += layout.numel
    if offset < 0.9 * flat.numel():
        return None
    return Adam_mini(named, dim=HIDDEN, n_heads=HEADS, n_kv_heads=KV_HEADS, verbose=False, **SETTINGS).step


def arms(numel: int, device: torch.device, before: str | None) -> dict[str, Callable[[], None]]:
    """Arm -> one step of it."""
    model = layouts(numel)
    flat = torch.nn.Parameter(torch.randn(numel, device=device))
    flat.grad = torch.randn(numel, device=device)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        BASE: lambda: torch.optim.AdamW([flat], fused=True, **SETTINGS),
        **{kind: functools.partial(ours, kind, flat, numel) for kind in CLASSES},
        **_peers(flat),
    }
    if before:
        known = importlib.import_module(f"{before}.optim")
        for kind in CLASSES.keys() & {*dir(known), *getattr(known, "CLASSES", ())}:
            makers[f"{kind}, before"] = functools.partial(ours, kind, flat, numel, before)
    if numel <= 120_000_000:
        makers["torch foreach AdamW"] = lambda: torch.optim.AdamW([flat], foreach=True, **SETTINGS)
    moments = {name: torch.zeros(numel, device=device) for name in ("exp_avg", "exp_avg_sq")}
    use_huge_pages(*moments.values())
    found: dict[str, Callable[[], None]] = {}
    for name, make in makers.items():
        optimizer = make()
        optimizer.step()
        for key, shared in moments.items():
            if key in optimizer.state[flat] and optimizer.state[flat][key].shape == shared.shape:
                optimizer.state[flat][key] = shared
        found[name] = optimizer.step
    official_step = official(flat, model) if numel <= 120_000_000 else None
    if official_step is not None:
        found["official adam-mini"] = official_step
    out = torch.empty(numel, device=device).zero_()
    use_huge_pages(out)
    p, g = flat.data, flat.grad
    found["triad"] = lambda: torch.add(p, g, alpha=0.5, out=out)
    found["copy"] = lambda: out.copy_(g)
    return found


def _peers(flat: torch.Tensor) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """DeepSpeed's and Apex's optimizers for the device, where they are installed and build."""
    found: dict[str, Callable[[], torch.optim.Optimizer]] = {}
    for name, module, attribute, cuda, extra in (
        ("DeepSpeedCPUAdam", "deepspeed.ops.adam", "DeepSpeedCPUAdam", False, {"adamw_mode": True}),
        ("DeepSpeedCPULion", "deepspeed.ops.lion", "DeepSpeedCPULion", False, LION),
        ("DeepSpeed FusedAdam", "deepspeed.ops.adam", "FusedAdam", True, {}),
        ("Apex FusedAdam", "apex.optimizers", "FusedAdam", True, {}),
    ):
        if cuda != flat.is_cuda:
            continue
        try:
            kind = getattr(importlib.import_module(module), attribute)
            settings = extra if extra is LION else {**SETTINGS, **extra}
            kind([torch.nn.Parameter(torch.zeros(8, device=flat.device))], **settings)
        except Exception as error:  # not installed, or its extension does not build here
            print(f"{name} is left out: {type(error).__name__}: {error}")
            continue
        found[name] = functools.partial(kind, [flat], **settings)
    return found


def measure(
    found: dict[str, Callable[[], None]], rounds: int, device: torch.device, title: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every arm in every round; on a GPU, also how many kernels a step launches."""
    times: dict[str, list[float]] = {name: [] for name in found}
    order = list(found.items())
    for number in track(range(rounds + 2), description=title, transient=True):
        order = order[1:] + order[:1]
        for name, step in order:
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    return times, {name: launches(step) for name, step in found.items()} if device.type == "cuda" else {}


def launches(step: Callable[[], None]) -> int:
    """Kernels a step launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(
        event.count
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith("Mem")
    )


def _bytes_per_element(name: str) -> int:
    if name in ("triad", "copy"):
        return {"triad": 12, "copy": 8}[name]
    return BYTES["Adam-mini and Lion" if "ini" in name or "Lion" in name else "AdamW"]


def summary(numel: int, times: dict[str, list[float]], launched: dict[str, int]) -> list[dict]:
    """One entry per arm: median and least milliseconds, ratio to the base arm with quartiles and that of the least
    times, GB/s, share of triad's GB/s, kernel launches."""
    rates = {name: numel * _bytes_per_element(name) / statistics.median(t) / 1e9 for name, t in times.items()}
    entries = []
    for name, seconds in times.items():
        ratios = sorted(t / base for t, base in zip(seconds, times[BASE]))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        share = statistics.median(
            [numel * _bytes_per_element(name) / t / (numel * 12 / triad) for t, triad in zip(seconds, times["triad"])]
        )
        entries.append(
            {
                "elements": numel,
                "arm": name,
                "ms": statistics.median(seconds) * 1e3,
                "ratio": middle,
                "quartiles": [low, high],
                "least_ms": min(seconds) * 1e3,
                "least_ratio": min(seconds) / min(times[BASE]),
                "GB_per_s": rates[name],
                "of_triad": share,
                "launches": launched.get(name),
            }
        )
    return entries


def show(entries: list[dict], console: Console) -> None:
    table = Table(
        title=f"{entries[0]['elements'] / 1e6:.0f}M float32 elements, {torch.get_num_threads()} threads; "
        f"ratios to {BASE}"
    )
    table.add_column("arm", no_wrap=True)
    for column in ("ms", "ratio", "quartiles", "least ms", "ratio", "GB/s", "of triad", "kernels"):
        table.add_column(column, justify="right", no_wrap=True)
    for e in entries:
        low, high = e["quartiles"]
        table.add_row(
            e["arm"],
            f"{e['ms']:.3g}",
            f"{e['ratio']:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{e['least_ms']:.3g}",
            f"{e['least_ratio']:.3f}",
            f"{e['GB_per_s']:.1f}",
            f"{e['of_triad']:.0%}",
            "" if e["launches"] is None else str(e["launches"]),
        )
    console.print(table)


def plan_times() -> list[dict]:
    """Seconds and bytes of the plans of one rank of LLaMA-3 70B."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plan_70b import WAYS, kept_bytes, rank_plans

    found = []
    for way in WAYS:
        began = time.perf_counter()
        plans = rank_plans(way)
        found.append(
            {"plans": f"70B, TP 8 x DP 512, {way}", "seconds": time.perf_counter() - began, "bytes": kept_bytes(*plans)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 1e8, 4e8], help="elements of the shard")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--before", type=Path, help="another checkout, whose optimizers are stepped too")
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = None if args.before is None else import_before(args.before)
    console = Console(width=120)
    console.print(f"kernel: {kernel_for(device).name} on {device}, torch {torch.__version__}")
    plans = plan_times()
    for plan in plans:
        console.print(f"plans of a rank of {plan['plans']}: {plan['seconds']:.2f} s, {plan['bytes'] / 1e6:.2f} MB")
    entries = []
    for size in args.sizes:
        rounds = args.rounds if size <= 2e8 else args.rounds // 3
        found = arms(int(size), device, before)
        entries += summary(int(size), *measure(found, rounds, device, f"{size / 1e6:.0f}M elements"))
        show([e for e in entries if e["elements"] == int(size)], console)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"steps": entries, "plans": plans}, indent=1))
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
