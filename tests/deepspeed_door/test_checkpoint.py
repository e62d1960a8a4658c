"""Saving and loading through DeepSpeed: to the bit on the same layout, and at any other through universal checkpoints."""
import json
import os

import pytest
import torch
import torch.distributed as dist

from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make, worst_difference

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SUB_GROUPS = {"sub_group_size": 3000}
TOTAL = 10


def _losses_and_weights(engine, first, steps):
    return train(engine, steps, first=first), weights(engine)


def resumed(kind, model, stage, options, folder):
    """(losses, weights equal) of a run that went on and of one that was loaded, both after the same save."""
    if options.get("dtype") == "fp16":
        from deepspeed.accelerator import get_accelerator
        get_accelerator().is_fp16_supported = lambda: True  # torch computes in half on any CPU; DeepSpeed asks for AMX
    settings = config(kind, stage, steps=TOTAL, **options)
    engine = start(make(model), settings)
    train(engine, 3)
    engine.save_checkpoint(folder)
    wanted, wanted_weights = _losses_and_weights(engine, 3, 3)
    engine.destroy()
    engine = start(make(model, seed=5), settings)
    engine.load_checkpoint(folder)
    found, found_weights = _losses_and_weights(engine, 3, 3)
    engine.destroy()
    return wanted, found, all(torch.equal(wanted_weights[name], found_weights[name]) for name in wanted_weights)


@pytest.mark.parametrize("kind, model, stage, ranks, options", [
    (ADAMW, "gpt2", 0, 2, {}),
    (MINI, "llama", 0, 2, {}),
    (MINI, "gpt2", 0, 2, {"dtype": "bf16"}),
    (ADAMW, "gpt2", 1, 2, {"dtype": "bf16"}),
    (MINI, "gpt_neox", 1, 2, {}),
    (MINI, "llama", 1, 2, {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}),
    (MINI, "llama", 2, 2, {"dtype": "fp16"}),
    (MINI, "llama_tied", 2, 3, {}),
    (MINI, "gpt2", 2, 2, {"zero": OFFLOAD}),
    (ADAMW, "gpt_neox", 3, 2, {"zero": OFFLOAD}),
    (MINI, "gpt2", 3, 3, {}),
    (MINI, "llama", 3, 2, {"zero": SUB_GROUPS, "dtype": "bf16"}),
])
def test_a_resumed_run_goes_on_to_the_bit(kind, model, stage, ranks, options, tmp_path):
    for wanted, found, equal in pool(ranks).run(resumed, kind, model, stage, options, str(tmp_path)):
        assert wanted == found
        assert equal
