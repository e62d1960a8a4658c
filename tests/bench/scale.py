"""LLaMA-3 70B and 405B on 512 to 16,384 GPUs, on paper: what our optimizers add on a rank of Megatron.

``python tests/bench/scale.py --write`` puts the table into README.md. No GPU, no network: the shard map of every pipeline stage
and data-parallel rank is built from names and shapes, and checked: all ranks together hold every element exactly once,
and their shards begin where Adam-mini's sums expect it. Tensor-parallel ranks hold the like of one another. Plans are built
and timed for three ranks of the first, a middle and the last stage.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockwise_lr.argument_file import megatron_model
from blockwise_lr.optim import ShardBoundaries, ShardMap
from blockwise_lr.optim.segment_sync import SegmentSync, sync_of
from blockwise_lr.plan.shards import even_boundaries
from blockwise_lr.plan.step_plan import StepPlan, element_plan, segment_plan
from blockwise_lr.planning import MegatronLayout, MegatronStates
from blockwise_lr.planning.megatron_layout import Buffer
from blockwise_lr.rules import RULES

HERE = Path(__file__).parent
VOCABULARY = 128256
# LLaMA 3's report (arXiv 2407.21783): 126 layers of 16384, of which 16 stages have 8 but the first and last, 7
FLAGS_405B = """--num-layers 126 --hidden-size 16384 --num-attention-heads 128 --ffn-hidden-size 53248 --group-query-attention
--num-query-groups 8 --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights"""
MODELS = {
    "70B": dict(tensor=8, pipeline=8),
    "405B": dict(tensor=8, pipeline=16, embedding_as_layer=True, loss_as_layer=True),
}
GPUS = (512, 2048, 8192, 16384)
FILE_SYSTEM = 100e9  # bytes a second that all ranks together write


@dataclass(frozen=True)
class Row:
    """Of one model on so many GPUs; bytes and seconds of the rank with the most of those looked at."""

    model: str
    layout: MegatronLayout
    checked: int
    states: tuple[int, int]
    plan: tuple[int, int]
    seconds: tuple[float, float]
    collective: tuple[int, int]
    checkpoint: tuple[int, int]


def shapes_of(model: str, folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Megatron's names and shapes, and numbers of heads."""
    file = HERE.parents[1] / "configs" / "megatron" / "llama-3-70b.args"
    if model == "405B":
        file = folder / "llama-3-405b.args"
        file.write_text(FLAGS_405B)
    made = megatron_model(file, VOCABULARY)
    return {name: tuple(p.shape) for name, p in made.named_parameters()}, made.config


def check(states: MegatronStates, buffer: Buffer) -> int:
    """Builds the shard map of every rank of a buffer; how many there are.

    Raises:
        AssertionError: an element that no rank holds or two do, or a shard that begins elsewhere than its boundary.
    """
    ends = {place.name: 0 for place in buffer.places}
    starts: dict[str, list[int]] = {place.name: [] for place in buffer.places}
    for rank in range(buffer.ranks):
        for fragment in states.fragments(buffer, rank):
            assert fragment.start == ends[fragment.name], (
                f"{fragment} of rank {rank} does not begin where the last one ended"
            )
            starts[fragment.name] += [fragment.start] if fragment.start else []
            ends[fragment.name] += fragment.numel
    for place in buffer.places:
        assert ends[place.name] == place.numel, f"{place.name} has elements that no rank holds"
        assert starts[place.name] == even_boundaries(place.numel, place.bucket // buffer.ranks, place.start).tolist()
    return buffer.ranks


def rank_plans(
    states: MegatronStates, stage: int, data: int, kind: str
) -> tuple[ShardMap, list[StepPlan], SegmentSync, int]:
    """What a rank builds at start; last, how many sums of rows it shares with other tensor-parallel ranks."""
    rule = RULES[kind]
    layouts = {name: rule.segments(layout, "element") for name, layout in states.layouts(stage).items()}
    is_cut = rule.segment_state is not None
    flats, plans, cuts, parts = [], [], {}, {}
    for buffer in states.buffers(stage):
        for place in buffer.places:
            positions = even_boundaries(place.numel, place.bucket // buffer.ranks, place.start)
            if is_cut and len(positions):
                cuts[place.name] = ShardBoundaries(positions)
            if is_cut and re.search(r"linear_(?:proj|fc2)\.weight$", place.name):
                parts[place.name] = states.layout.tensor
        for fragment in states.fragments(buffer, data):
            one = [fragment], [layouts[fragment.name]]
            plans.append(
                segment_plan(fragment.numel, *one, parts=parts) if is_cut else element_plan(fragment.numel, *one)
            )
            flats.append((torch.empty(0, device="meta"), [fragment]))
    shards = ShardMap(flats, cuts)
    sums = sum(run.count for plan in plans for run in plan.runs if run.name in parts)
    return shards, plans, sync_of(shards, plans, layouts), sums


def kept_bytes(shards: ShardMap, plans: list[StepPlan], sync: SegmentSync, sums: int) -> int:
    """Bytes of all tables that stay."""
    shares = [share for stage in sync.over_shards for share in stage.local_to_buffer]
    tables = sum(plan.nbytes for plan in plans) + sum(cut.positions.nbytes for cut in shards.boundaries.values())
    tables += 3 * 8 * sums  # their places in the sums over slices
    return tables + sum(share.slots.nbytes + share.index.nbytes + share.total.nbytes for share in shares)


def measured(model: str, gpus: int, folder: Path) -> Row:
    shapes, config = shapes_of(model, folder)
    sizes = MODELS[model]
    layout = MegatronLayout(**sizes, data=gpus // (sizes["tensor"] * sizes["pipeline"]))
    kinds = ("adamw", "adam_mini")
    every = {kind: MegatronStates(shapes, config, layout, optimizer=kind) for kind in kinds}
    stages = range(layout.pipeline)
    checked = sum(check(every["adamw"], buffer) for stage in stages for buffer in every["adamw"].buffers(stage))
    plan, seconds, collective, checkpoint = {}, {}, {}, {}
    for kind, states in every.items():
        found = []
        for stage in sorted({0, layout.pipeline // 2, layout.pipeline - 1}):
            for data in sorted({0, layout.data // 2, layout.data - 1}):
                began = time.perf_counter()
                built = rank_plans(states, stage, data, kind)
                took = time.perf_counter() - began
                sent = 4 * (sum(one.size for one in built[2].over_shards) + built[3])
                found.append((kept_bytes(*built), took, sent))
        plan[kind], seconds[kind], collective[kind] = (max(column) for column in zip(*found))
        one = MegatronStates(shapes, config, MegatronLayout(**sizes, distributed=False), optimizer=kind)
        whole = [one.of_rank(stage) for stage in stages]
        checkpoint[kind] = layout.tensor * sum(of.parameters + of.masters + of.moments for of in whole)
    pairs = [tuple(of[kind] for kind in kinds) for of in (plan, seconds, collective, checkpoint)]
    totals = tuple(every[kind].largest().total for kind in kinds)
    return Row(model, layout, checked, totals, *pairs)  # type: ignore[arg-type]


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = [
        "model",
        "GPUs",
        "layout",
        "shard maps checked",
        "states a rank (GiB)",
        "plans a rank (KiB)",
        "built in (ms)",
    ]
    head += ["summed a step (KiB)", "checkpoint (TB)", f"written at {FILE_SYSTEM / 1e9:.0f} GB/s (s)"]
    lines = [head, ["---", "--:", "---", *["--:"] * 7]]
    for row in rows:
        size = str(row.layout).partition(",")[0]
        pairs = (
            (row.states, 2**30, ".2f"),
            (row.plan, 2**10, ",.0f"),
            (row.seconds, 1e-3, ",.0f"),
            (row.collective, 1024, ",.0f"),
        )
        cells = [" / ".join(format(value / unit, form) for value in pair) for pair, unit, form in pairs]
        stored = " / ".join(f"{value / 1e12:.2f}" for value in row.checkpoint)
        written = " / ".join(f"{value / FILE_SYSTEM:.0f}" for value in row.checkpoint)
        lines.append([row.model, f"{row.layout.ranks:,}", size, f"{row.checked:,}", *cells, stored, written])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    np.seterr(all="raise")
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    rows = [measured(model, gpus, folder) for model in args.models for gpus in args.gpus]
    print(table(rows))
    if args.write:
        page = HERE / "README.md"
        begin, end = "<!-- scale -->\n", "\n<!-- end of scale -->"
        before, _, rest = page.read_text().partition(begin)
        page.write_text(before + begin + table(rows) + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
