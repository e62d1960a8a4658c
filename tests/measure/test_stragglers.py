"""Which rank is slow: forward passes that one rank takes longer for, in the doors and in the figures."""

import statistics
import time

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train
from ranks import pool
from twins import make, token_ids

from blockwise_lr import BlockwiseAdamW, map_blocks
from blockwise_lr.measure import BlockMonitor
from blockwise_lr.measure.stragglers import ForwardTimes, slowest

PAUSE = 0.4  # of the slow rank in each forward pass, far above what a tiny model takes


def slow_down(model, rank):
    """Has a rank sleep within the model's forward pass."""
    if dist.get_rank() == rank:
        model.register_forward_pre_hook(lambda *_: time.sleep(PAUSE))


def under_deepspeed(folder, rank):
    from blockwise_lr.deepspeed.metrics import figures_of

    monitors = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    model = make("llama")
    engine = start(model, config("BlockwiseAdamW", 2, block_metrics={"every": 2}, **monitors))
    slow_down(model, rank)
    train(engine, 2)
    figures, passes = figures_of(engine), engine.gradient_accumulation_steps()
    engine.destroy()
    return {name: value for name, value in figures.items() if name.startswith("forward_time")}, passes


def test_a_ds_config_names_the_slow_rank(tmp_path):
    (first, passes), (second, _) = pool(2).run(under_deepspeed, str(tmp_path), 1)
    assert first == second and first["forward_time/rank"] == 1
    assert first["forward_time/slowest"] >= passes * PAUSE and 1 < first["forward_time/to_median"] <= 2
    written = {file.stem for file in (tmp_path / "run").glob("Train_Blocks_forward_time_*.csv")}
    assert written == {f"Train_Blocks_forward_time_{name}" for name in ("slowest", "to_median", "rank")}


def under_ddp():
    """Figures of three reports of one step each, of which the last had passes of no training step alone."""
    model = make("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
    monitor = BlockMonitor(optimizer, every=1, model=wrapped)
    slow_down(model, 0)
    ids, seen = token_ids(1, 1, 1)[0][0][0], []
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(ids, labels=ids).loss.backward()
        optimizer.step()
        wrapped.eval()
        wrapped(ids, labels=ids)  # an evaluation is no part of a step
        wrapped.train()
        seen.append(monitor.report())
    with torch.no_grad():
        wrapped(ids)
    seen.append(monitor.report())
    monitor.close()
    wrapped(ids)
    return seen, len(monitor._times._passes)


def test_plain_ddp_tells_it_of_training_passes_alone():
    (first, left), (second, _) = pool(2).run(under_ddp)
    assert first == second and left == 0
    for figures in first[:2]:
        assert figures["forward_time/rank"] == 0 and PAUSE <= figures["forward_time/slowest"] < 2 * PAUSE
    assert "forward_time/rank" not in first[2]


def test_of_each_rank_the_median_step_counts():
    """A step that takes long once, as for a save or a first compilation, makes no rank a slow one."""
    times = ForwardTimes([])
    times._seconds = [9.0, 1.0, 1.1]
    assert statistics.median(times._seconds) == 1.1 and times.figures() == {}  # one process


@pytest.mark.parametrize(
    "seconds, rank, ratio",
    [([1.0, 3.0, 2.0], 1, 1.5), ([1.0, 1.0, 0.0, 4.0], 3, 4.0), ([2.0, 2.0], 0, 1.0)],
)
def test_the_figures_of_ranks_times(seconds, rank, ratio):
    assert slowest(seconds) == {
        "forward_time/slowest": max(seconds),
        "forward_time/to_median": ratio,
        "forward_time/rank": rank,
    }
    assert slowest([0.0, 0.0]) == {}
