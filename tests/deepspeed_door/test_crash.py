"""Killed at random points, mid-step and mid-save, a run goes on from its newest complete checkpoint to the bit."""

import hashlib
import itertools
import json
import random
import signal
import statistics
import time
from collections import Counter
from multiprocessing.connection import wait

import pytest
import ranks
from deepspeed_door.engines import config

from blockwise_lr.checkpoint import Manifest, newest_complete, verify
from blockwise_lr.checkpoint.survey import scan_checkpoints

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
RANKS, STEPS, SEED = 2, 12, 20260
SECONDS = 5  # until ranks of the other tests give up waiting
RUNS = {
    "AdamW, ZeRO-1, bf16": config(ADAMW, 1, steps=STEPS, dtype="bf16"),
    "Adam-mini, BF16_Optimizer": config(MINI, 1, steps=STEPS, dtype="bf16", data_types={"grad_accum_dtype": "fp32"}),
    "AdamW, ZeRO-2, fp32": config(ADAMW, 2, steps=STEPS),
    "Adam-mini, ZeRO-3, bf16": config(MINI, 3, steps=STEPS, dtype="bf16"),
}


@pytest.fixture(scope="module")
def server():
    """Forks ranks from a process that has imported all they need."""
    return ranks.server()


class Run:
    """One start of all ranks."""

    def __init__(self, context, target, *arguments):
        port = ranks.free_port()
        self.pipes, self.processes, self.events = [], [], [[] for _ in range(RANKS)]
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(rank, RANKS, port, theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def wait_for(self, rank, kind, count, seconds=60):
        """Waits until a rank has sent ``count`` events of a kind, or "done", or has ended."""
        deadline = time.monotonic() + seconds
        while sum(event[0] == kind for event in self.events[rank]) < count:
            assert wait([self.pipes[rank]], deadline - time.monotonic()), f"no {kind!r} within {seconds} s"
            if not self._read(rank) or self.events[rank][-1][0] == "done":
                return

    def end(self, seconds=60):
        """Waits for all ranks to end by themselves, ends those that do not; returns the exit codes, None for these."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        codes = [process.exitcode for process in self.processes]
        for rank, process in enumerate(self.processes):
            process.kill()
            process.join()
            while self._read(rank):
                pass
        return codes

    def _read(self, rank):
        try:
            self.events[rank].append(self.pipes[rank].recv())
            return True
        except EOFError:
            return False


def losses(folder):
    """(rank's file, step) -> every loss noted for it, over all starts."""
    found = {}
    for path in folder.glob("losses-*.jsonl"):
        for line in path.read_text().splitlines():
            step, values = json.loads(line)
            found.setdefault((path.name, step), set()).add(tuple(values))
    return found


def files(folder):
    """Path -> SHA-256 of the files in a folder's complete checkpoints."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for tag in scan_checkpoints(folder).tags
        for path in (folder / tag).iterdir()
    }


def uninterrupted(server, folder, settings):
    """The losses of a run that nobody kills, and the usual seconds of a step and of a save."""
    from deepspeed_door.crash_worker import run

    folder.mkdir()
    whole = Run(server, run, str(folder), settings, STEPS)
    assert whole.end() == [0, 0]
    events = whole.events[0]
    seconds = {
        kind: statistics.median(
            after[2] - before[2] for before, after in itertools.pairwise(events) if before[0] == kind
        )
        for kind in ("step", "save")
    }
    found = losses(folder)
    assert len(found) == RANKS * STEPS and all(len(values) == 1 for values in found.values())
    return found, seconds


def start_and_kill(server, folder, settings, victim, kind, count, delay):
    """Starts where the last start was killed, kills a rank, and looks at what is left.

    Returns:
        The killed rank's last event, or None if it was through before it could be killed.
    """
    from deepspeed_door.crash_worker import run

    before, newest = files(folder), newest_complete(folder)
    started = Run(server, run, str(folder), settings, STEPS)
    started.wait_for(victim, kind, count)
    time.sleep(delay)
    started.processes[victim].kill()
    codes = started.end()
    assert None not in codes, "a rank hung after another was killed"
    assert started.events[victim][0][1] == (Manifest.read(folder / newest).steps if newest else 0)
    after = files(folder)
    assert {path: after.get(path) for path in before} == before  # what was complete is as it was
    for tag in scan_checkpoints(folder).tags:
        verify(folder / tag)
    latest = folder / "latest"
    assert not latest.exists() or latest.read_text() in scan_checkpoints(folder).tags
    return started.events[victim][-1] if codes[victim] == -signal.SIGKILL else None


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "runs, each, least", [((0, 3), 3, 1), pytest.param((0, 1, 2, 3), 5, 3, marks=pytest.mark.full)]
)
def test_kills_change_no_bit(runs, each, least, server, tmp_path):
    from deepspeed_door.crash_worker import run

    landed, kills = Counter(), 0
    for number, (name, settings) in ((number, list(RUNS.items())[number]) for number in runs):
        wanted, seconds = uninterrupted(server, tmp_path / f"whole-{number}", settings)
        rng, folder = random.Random(SEED + number), None
        while kills < each * (runs.index(number) + 1):
            if folder is None:
                folder = tmp_path / f"killed-{number}-{kills}"
                folder.mkdir()
            kind = ("save", "step")[kills % 2]
            plan = dict(
                victim=rng.randrange(RANKS), kind=kind, count=rng.choice([1, 2]), delay=rng.uniform(0, seconds[kind])
            )
            print(f"{name}: {plan}")
            last = start_and_kill(server, folder, settings, **plan)
            if last is None:  # it was through: from the beginning again
                folder = None
                continue
            kills += 1
            tag = f"global_step{last[1] + 1}"
            landed[last[0]] += 1
            landed["incomplete"] += (
                last[0] == "save" and (folder / tag).exists() and tag not in scan_checkpoints(folder).tags
            )
            assert losses(folder).items() <= wanted.items()
        assert Run(server, run, str(folder), settings, STEPS).end() == [0, 0]
        assert losses(folder) == wanted
    print(f"{kills} kills: {dict(landed)}")
    assert min(landed["step"], landed["save"], landed["incomplete"]) >= least, "the kills miss what they are meant for"


@pytest.mark.parametrize("how", ["misconfigured", "dead", "silent"])
def test_a_rank_that_fails_before_the_first_step_leaves_none_hanging(how, server):
    from deepspeed_door.crash_worker import fail_before_the_first_step

    started, seconds = Run(server, fail_before_the_first_step, config(MINI, 2), how, SECONDS), SECONDS + 15
    started.wait_for(0, "error", 1, seconds)
    ((name, message),) = started.events[0]
    assert name != "trained"
    if how == "misconfigured":
        assert 'block_lr_ratios is "paper" on rank 0 and {"qk": -1.0} on rank 1' in message
    if how == "silent":
        assert f"{1000 * SECONDS}ms" in message
    started.processes[0].join(seconds)
    assert started.processes[0].exitcode not in (None, 0)
    started.end(0)
