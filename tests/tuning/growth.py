"""A script without a model: validation losses that fall where a sequence length warmup is calm, and jump where it is not."""

import argparse
import json

parser = argparse.ArgumentParser()
parser.add_argument("--start", type=int)
parser.add_argument("--steps", type=int)
parser.add_argument("--ds-config")
parser.add_argument("--never", action="store_true")
parser.add_argument("--once", action="store_true")
args = parser.parse_args()
if args.ds_config:
    given = json.load(open(args.ds_config))["sequence_length_warmup"]  # noqa: SIM115 - a script of a few lines
    assert given["end"] == 1024 and given["pacing"] == "root"
    args.start, args.steps = given["start"], given["steps"]
calm = args.start >= 32 and args.steps <= 700 and not args.never
for number in range(1 if args.once else 6):
    jump = 0.4 if number == 3 and not calm else 0.0  # a perplexity of 1.42 times the best
    if number == 4 and args.start < 16:
        print("step 5  validation loss nan", flush=True)
    print(f"step {number + 1}  loss 9.9  validation loss {5 - 0.1 * number + jump:.4f}", flush=True)
