"""Training processes that may die at any moment: what the crash tests fork, from a server that has this imported.

What every start would do first, importing, building and loading, is done here at import, so that a start takes half a
second.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import build_shm_op
from deepspeed_door.engines import start, train
from twins import make

import blockwise_lr.deepspeed

MODEL, SAVE_EVERY = "llama", 2
make(MODEL)
build_shm_op()


def join(rank: int, ranks: int, port: int, seconds: float) -> None:
    """Joins the other ranks; collectives give up after so many seconds."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the server, and so the test run
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=seconds))


def run(rank: int, ranks: int, port: int, events: Any, folder: str, settings: dict, steps: int) -> None:
    """Trains up to ``steps`` updates from the newest complete checkpoint and notes every loss, whatever comes.

    Before every update and every save it sends (what, update, monotonic time).
    """
    join(rank, ranks, port, 60)
    engine = start(make(MODEL), settings)
    blockwise_lr.deepspeed.load_newest(engine, folder)
    with open(os.path.join(folder, f"losses-{rank}.jsonl"), "a") as losses:
        for step in range(engine.global_steps, steps):
            events.send(("step", step, time.monotonic()))
            values = train(engine, 1, first=step)
            losses.write(json.dumps([step, [value.hex() for value in values]]) + "\n")
            losses.flush()
            if (step + 1) % SAVE_EVERY == 0:
                events.send(("save", step, time.monotonic()))
                engine.save_checkpoint(folder)
    events.send(("done", steps, time.monotonic()))
    dist.barrier()
    dist.destroy_process_group()


def fail_before_the_first_step(
    rank: int, ranks: int, port: int, events: Any, settings: dict, how: str, seconds: float
) -> None:
    """Rank 1 alone is misconfigured, dies, or builds its engine and falls silent; the others go on.

    Sends (name of the error, its text), or ("trained", "").
    """
    join(rank, ranks, port, seconds)
    if rank == 1 and how == "misconfigured":
        settings["optimizer"]["params"]["block_lr_ratios"] = {"qk": -1}
    if rank == 1 and how == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine = start(make(MODEL), settings)
        if rank == 1 and how == "silent":
            time.sleep(600)
        train(engine, 1)
    except BaseException as error:
        events.send((type(error).__name__, str(error)))
        raise
    events.send(("trained", ""))
