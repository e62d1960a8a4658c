"""torchrun over two nodes whose link is cut: both sides end and say why, and a restart goes on to the bit."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from deepspeed_door.engines import config, start, train
from extensions import build_once
from nodes.namespaces import Nodes, end, logs, wait_for, why_not
from nodes.train_on_nodes import TOTAL
from ranks import pool
from twins import make

from blockwise_lr.checkpoint import newest_complete, verify

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("train_on_nodes.py")
SECONDS = 15  # after which a collective gives up

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.timeout(600)]


@pytest.fixture
def nodes():
    build_once()
    made = Nodes()
    yield made
    made.close()


def launch(nodes, folder, pause):
    environment = {
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "PAUSE": str(pause),
        "SECONDS": str(SECONDS),
    }
    return nodes.torchrun(["-m", "blockwise_lr.deepspeed", str(SCRIPT), str(folder)], folder, environment)


def events(folder, rank):
    file = folder / f"events-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses_of_every_step():
    engine = start(make("llama"), config("BlockwiseAdamW", 2, steps=TOTAL))
    found = [train(engine, 1, first=step) for step in range(TOTAL)]
    engine.destroy()
    return found


@pytest.mark.parametrize(
    "during, newest",
    [pytest.param("writing", 2, marks=pytest.mark.full), pytest.param("within", 2, marks=pytest.mark.full)],
    ids=["save", "step"],
)
def test_a_cut_link_ends_both_sides_and_the_restart_goes_on_to_the_bit(nodes, tmp_path, during, newest):
    agents = launch(nodes, tmp_path, pause=1)
    at = 4 if during == "writing" else 3  # the second save, or the update after the first
    wait_for(tmp_path, agents, lambda: all({during: at} in events(tmp_path, rank) for rank in (0, 1)))
    began = time.monotonic()
    nodes.cut()
    nodes.wait_for_ranks(tmp_path, SECONDS + 60)
    print(f"the ranks ended {time.monotonic() - began:.0f} s after the cut")
    # torchrun's agent that cannot reach the other's store waits for minutes; srun --kill-on-bad-exit ends it when one fails
    codes = end(agents, 20)
    nodes.end_all()
    assert 1 in codes and 0 not in codes, f"{codes}\n{logs(tmp_path)}"
    check_what_is_said(tmp_path)
    saves = tmp_path / "checkpoints"
    assert newest_complete(saves) == f"global_step{newest}" and (saves / "latest").read_text() == f"global_step{newest}"
    verify(saves / f"global_step{newest}")
    nodes.mend()
    agents = launch(nodes, tmp_path, pause=0)
    assert end(agents, 200) == [0, 0], logs(tmp_path)
    whole = pool(2).run(losses_of_every_step)
    for rank in (0, 1):
        told = events(tmp_path, rank)
        assert [event["start"] for event in told if "start" in event] == [0, newest]
        steps = [(event["step"], event["losses"]) for event in told if "step" in event]
        assert all(losses == whole[rank][step] for step, losses in steps)
        assert {step for step, _ in steps} == set(range(TOTAL)) and told[-1] == {"done": TOTAL}


def check_what_is_said(folder):
    """One line of ours on each node, which names the rank that is missing, or the node with the store."""
    node_of = {rank: next(event["node"] for event in events(folder, rank) if "node" in event) for rank in (0, 1)}
    said = {}
    for number in (1, 2):
        log = (folder / f"node-{number}.log").read_text()
        lines = re.findall(r"^.*blockwise_lr\.deepspeed, rank (\d): (.*)$", log, re.M)
        assert len(lines) == 1, log
        said[f"node-{number}"] = lines[0]
    rank, words = said[node_of[0]]
    assert rank == "0" and words.startswith(f"rank 1 on {node_of[1]} of 2 gives no answer"), said
    rank, words = said[node_of[1]]
    assert rank == "1" and words.startswith("the key-value store of rank 0's node (10.77.0."), said
