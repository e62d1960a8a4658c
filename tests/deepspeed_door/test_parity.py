"""Law 1: any ZeRO stage, number of ranks and layout trains as one process with torch's AdamW per block type does."""

import pytest
import torch
from deepspeed_door.engines import config, reference, trained
from deepspeed_door.own_gradients import followed
from kinds import with_kinds
from ranks import pool
from twins import worst_difference

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SUB_GROUPS = {"sub_group_size": 3000}


def end_to_end(kind, model, stage, steps, options):
    """This case's worst relative difference of any tensor, on each rank."""
    import torch.distributed as dist

    found = trained(model, config(kind, stage, steps=steps, **options), steps)
    return worst_difference(found, reference(model, kind, steps, dist.get_world_size()), kind)


CASES = [
    ("llama", 0, 1, {}),
    ("llama", 0, 2, {}),
    ("gpt2", 0, 2, {}),
    ("gpt_neox", 1, 1, {}),
    ("llama", 1, 2, {}),
    ("gpt_neox", 1, 2, {}),
    ("llama_tied", 1, 3, {}),
    ("gpt2", 1, 4, {}),
    ("llama_tied", 2, 1, {}),
    ("gpt_neox", 2, 2, {}),
    ("llama", 2, 3, {}),
    ("llama", 2, 4, {}),
    ("gpt_neox", 2, 4, {}),
    ("llama", 2, 2, {"zero": OFFLOAD}),
    ("gpt2", 2, 2, {"zero": OFFLOAD}),
    ("llama", 3, 1, {}),
    ("gpt2", 3, 1, {}),
    ("gpt2", 3, 2, {"zero": SUB_GROUPS}),
    ("llama_tied", 3, 2, {}),
    ("gpt2", 3, 3, {}),
    ("llama_tied", 3, 4, {}),
    ("llama", 3, 4, {"zero": SUB_GROUPS}),
    ("gpt_neox", 3, 4, {"zero": {**SUB_GROUPS, **OFFLOAD}}),
]


@pytest.mark.parametrize("kind, model, stage, ranks, options", with_kinds(CASES))
def test_equals_the_unfused_twin(kind, model, stage, ranks, options, record_property):
    worst = max(pool(ranks).run(end_to_end, kind, model, stage, 10, options))
    record_property("worst", worst)
    assert worst < 1e-5


def low_precision(kind, model, stage, dtype, options):
    """How far 10 updates go from the twin's that computes in that dtype with fp32 master weights, over how far it goes."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes in half on any CPU; DeepSpeed wants it native
    found = trained(model, config(kind, stage, dtype=dtype, **options), 10)
    start = reference(model, kind, 0, 1)
    wanted = reference(model, kind, 10, 1, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    return worst_difference({n: found[n] - start[n] for n in found}, {n: wanted[n] - start[n] for n in found})


@pytest.mark.parametrize(
    "kind, model, stage, dtype, options",
    [
        (ADAMW, "llama", 0, "bf16", {}),
        (ADAMW, "llama", 1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
        (ADAMW, "gpt_neox", 2, "bf16", {}),
        (ADAMW, "llama", 3, "bf16", {}),
        (ADAMW, "gpt2", 2, "fp16", {}),
        (MINI, "llama", 1, "bf16", {}),
        (MINI, "gpt2", 1, "fp16", {}),
        # without ZeRO, DeepSpeed 0.19.8 divides fp16 gradients by a loss scale that it has not put on the loss
        (MINI, "gpt2", 0, "fp16", {"fp16": {"loss_scale": 1}}),
    ],
)
def test_low_precision_follows_the_twin(kind, model, stage, dtype, options):
    """Rounding differs (the twin adds micro batches in fp32), so this bounds the drift of the whole pass; the test below
    is the sharp one of the step."""
    assert max(pool(1).run(low_precision, kind, model, stage, dtype, options)) < 0.05


BF16_OPTIMIZER = {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    "kind, model, stage, ranks, options",
    with_kinds(
        [
            ("llama", 1, 2, BF16_OPTIMIZER),
            ("gpt2", 1, 2, {"dtype": "bf16"}),
            ("llama", 2, 2, {"dtype": "bf16"}),
            ("llama_tied", 3, 2, {"dtype": "bf16"}),
            ("llama", 2, 2, {"dtype": "fp16"}),
        ]
    ),
)
def test_low_precision_steps_equal_the_plain_optimizers_on_the_same_gradients(kind, model, stage, ranks, options):
    for worst, steps in pool(ranks).run(followed, kind, model, stage, options):
        assert worst < 1e-6 and steps == 10


def beside_torch(stage, dtype, ratio_one, options=None):
    """Our optimizer and DeepSpeed with torch's AdamW, a group per block type, on the same groups and gradients' dtype.

    With other groups ZeRO cuts elsewhere, and a norm of gradients that differs in its last bit flips roundings to bf16.
    """
    from deepspeed_door.engines import BETAS, DECAY, EPS, LR, start, train, weights
    from twins import RATIOS, Twin, make

    plain = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 3, "warmup_type": "linear"}}
    ratios = dict.fromkeys(RATIOS, 1.0) if ratio_one else RATIOS
    leaves = Twin("llama", make("llama")).leaves
    keys = sorted({("" if ratio_one else leaf.block, leaf.decayed) for leaf in leaves.values()})

    def groups(model):
        return [
            {
                "params": [
                    p
                    for n, p in model.named_parameters()
                    if ("" if ratio_one else leaves[n].block, leaves[n].decayed) == key
                ]
            }
            for key in keys
        ]

    model = make("llama")
    engine = start(
        model,
        config(
            ADAMW,
            stage,
            dtype=dtype,
            scheduler=plain,
            **(options or {}),
            # torch's formula in torch's order: a last bit flips roundings to bf16 too
            optimizer={"block_lr_ratios": {k: v for k, v in ratios.items() if k != "head"}, "kernel": "reference"},
        ),
        model_parameters=groups(model),
    )
    train(engine, 10)
    ours = weights(engine)
    engine.destroy()
    model = make("llama")
    with_rates = [
        {**group, "lr": ratios.get(key[0], 1.0) * LR, "weight_decay": DECAY if key[1] else 0.0}
        for group, key in zip(groups(model), keys)
    ]
    settings = config(
        "AdamW",
        stage,
        dtype=dtype,
        **(options or {}),
        scheduler={
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0.0,
                "warmup_max_lr": [g["lr"] for g in with_rates],
                "warmup_num_steps": 3,
                "warmup_type": "linear",
            },
        },
    )
    settings["optimizer"]["params"] = {
        "lr": LR,
        "betas": list(BETAS),
        "eps": EPS,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    engine = start(model, settings, model_parameters=with_rates)
    train(engine, 10)
    found = weights(engine)
    engine.destroy()
    return worst_difference(ours, found)


@pytest.mark.parametrize(
    "stage, dtype, ranks, ratio_one",
    [
        (0, "fp32", 2, True),
        (1, "bf16", 2, True),
        (2, "fp32", 2, False),
        (2, "bf16", 2, False),
        (3, "fp32", 2, True),
        (3, "bf16", 2, False),
    ],
)
def test_equals_torch_adamw_inside_deepspeed(stage, dtype, ranks, ratio_one):
    """With all ratios 1 it is torch's AdamW, and DeepSpeed's own scheduler keeps the ratios."""
    assert max(pool(ranks).run(beside_torch, stage, dtype, ratio_one)) < 1e-6
