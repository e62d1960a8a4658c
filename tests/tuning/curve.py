"""A script without a model: prints a loss that falls towards a bowl over the rates of a ds_config."""

import json
import math
import sys

params = json.loads(open(sys.argv[1]).read())["optimizer"]["params"]  # noqa: SIM115 - a script of a few lines
rate = params["lr"] * params["block_lr_ratios"]["ffn"]
for step in range(1, 9):
    print(f"step {step}  loss {2 + 0.1 * (math.log2(rate / 0.2)) ** 2 + 1 / step:.4f}", flush=True)
