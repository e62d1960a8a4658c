"""What a user's script does in the DeepSpeed door, for a job on a real Slurm: TOTAL updates, a line of losses for each.

PAUSE seconds before each, and a save after every SAVE_EVERY-th, by the environment's variables of these names.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train
from twins import make

import blockwise_lr.deepspeed

TOTAL = 12


def main(folder: str) -> None:
    torch.set_num_threads(1)
    engine = start(make("llama"), config("BlockwiseAdamW", 2, steps=TOTAL))
    blockwise_lr.deepspeed.preemption(engine, os.path.join(folder, "checkpoints"))
    log = Path(folder) / f"losses-{dist.get_rank()}.jsonl"
    with log.open("a") as lines:
        print(json.dumps({"start": engine.global_steps, "node": os.environ["SLURMD_NODENAME"]}), file=lines, flush=True)
        for step in range(engine.global_steps, TOTAL):
            time.sleep(float(os.environ.get("PAUSE", "0.3")))
            losses = train(engine, 1, first=step)
            print(json.dumps({"step": step, "losses": losses}), file=lines, flush=True)
            if engine.global_steps % int(os.environ.get("SAVE_EVERY", TOTAL + 1)) == 0:
                engine.save_checkpoint(os.path.join(folder, "checkpoints"))
        print(json.dumps({"done": engine.global_steps}), file=lines, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
