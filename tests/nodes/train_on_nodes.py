"""What a user's script does in the DeepSpeed door, for a job on two nodes: TOTAL updates, a line for each, a save every second.

PAUSE seconds within each update, and before each file that is saved, are there for the link to be cut in.
"""

import datetime
import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import build_shm_op
from deepspeed_door.engines import config, start, train
from twins import make

import blockwise_lr.deepspeed

TOTAL = 6


def meet(folder: Path) -> None:
    """Waits until every rank has imported what it needs, which takes one longer than another on a busy machine."""
    start = os.environ["START"]
    (folder / f"ready-{start}-{os.environ['RANK']}").touch()
    while len(list(folder.glob(f"ready-{start}-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    pause = float(os.environ["PAUSE"])
    build_shm_op()
    meet(Path(folder))
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=float(os.environ["SECONDS"])))
    with (Path(folder) / f"events-{dist.get_rank()}.jsonl").open("a") as lines:

        def tell(**event: object) -> None:
            print(json.dumps(event), file=lines, flush=True)

        model = make("llama")
        engine = start(model, config("BlockwiseAdamW", 2, steps=TOTAL))
        saves = os.path.join(folder, "checkpoints")
        blockwise_lr.deepspeed.preemption(engine, saves)
        tell(start=engine.global_steps, node=socket.gethostname())

        def before_a_pass(*_: object) -> None:
            tell(within=engine.global_steps)
            time.sleep(pause)

        def write(state: object, path: str) -> object:
            tell(writing=engine.global_steps)
            time.sleep(2 * pause)
            return upstream(state, path)

        model.register_forward_pre_hook(before_a_pass)
        upstream, engine.checkpoint_engine.save = engine.checkpoint_engine.save, write
        for step in range(engine.global_steps, TOTAL):
            losses = train(engine, 1, first=step)
            tell(step=step, losses=losses)
            if engine.global_steps % 2 == 0:
                engine.save_checkpoint(saves)
        tell(done=engine.global_steps)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
