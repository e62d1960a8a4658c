"""DeepSpeed's PipelineModule: two stages of two data-parallel ranks, beside plain optimizers, saved and resumed."""

import logging

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import BETAS, EPS
from deepspeed_door.test_parallel import (
    ADAMW,
    BLOCKS,
    LION,
    MINI,
    VOCABULARY,
    WIDTH,
    Expert,
    PlainLion,
    RowMini,
    plain_groups,
    settings_of,
)
from ranks import pool
from twins import worst_difference

# a PipelineModule calls its layers by their numbers
LAYERS = {"0.": "embed_tokens", "1.": "mlp", "2.": "mlp", "3.": "norm", "4.": "lm_head"}
RULES = [{"match": f"{number}*", "block": BLOCKS[part]} for number, part in LAYERS.items()]

PLAIN = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, betas=BETAS, eps=EPS),
    "RowMini": lambda groups: RowMini(groups, {}),
    "PlainLion": lambda groups: PlainLion(groups, {}),
}


def loss_of(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Named:
    """The module's parameters under names that tell their layers."""

    def __init__(self, module):
        self.module = module

    def named_parameters(self):
        return [(LAYERS[name[:2]] + name[1:], p) for name, p in self.module.named_parameters()]


def engine_of(kind, stage, change=None):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.utils import groups

    import blockwise_lr.deepspeed  # noqa: F401

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    groups.mpu = groups.mesh_device = None
    torch.manual_seed(0)
    odd = change is not None and dist.get_rank() == 3
    module = PipelineModule(
        [
            LayerSpec(torch.nn.Embedding, VOCABULARY, WIDTH),
            LayerSpec(Expert),
            LayerSpec(Expert),
            LayerSpec(torch.nn.LayerNorm, WIDTH),
            LayerSpec(torch.nn.Linear, WIDTH, VOCABULARY, bias=odd and change == "model"),
        ],
        num_stages=2,
        loss_fn=loss_of,
        partition_method="uniform",
    )
    for name, p in module.named_parameters():
        torch.manual_seed(sum(map(ord, name)))
        torch.nn.init.normal_(p, 0, 0.2)
    settings = settings_of(kind, stage, module, {})
    settings["gradient_accumulation_steps"] = 2
    arguments = {}
    if kind.startswith("Blockwise"):
        settings["optimizer"]["params"]["block_rules"] = RULES
        settings["optimizer"]["params"]["block_lr_ratios"] = {
            "preset": "paper",
            "qk": 2.0 if odd and change == "ratios" else 8.0,
        }
    else:
        made = plain_groups(Named(module))
        arguments["optimizer"] = PLAIN[kind](made)
    return deepspeed.initialize(model=module, config=settings, **arguments)[0]


def train(engine, first, last):
    copy = engine.grid.get_data_parallel_rank()
    for number in range(first, last):
        seeds = [10 * number + 2 * part + copy for part in range(2)]
        batches = [
            torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        engine.train_batch(iter([(ids, ids) for ids in batches]))


def plain(engine):
    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return found


def trained_and_resumed(kind, stage, folder):
    """The worst difference from a plain optimizer in a pipeline without ZeRO, and of a resumed run from that one."""
    engine = engine_of(kind, stage)
    train(engine, 0, 3)
    engine.save_checkpoint(folder)
    train(engine, 3, 6)
    straight = plain(engine)
    engine = engine_of(kind, stage)
    for p in engine.module.parameters():
        p.data.add_(0.1)
    assert engine.load_checkpoint(folder)[0] is not None
    train(engine, 3, 6)
    again = plain(engine)
    engine = engine_of({ADAMW: "AdamW", MINI: "RowMini", LION: "PlainLion"}[kind], 0)
    train(engine, 0, 6)
    return worst_difference(straight, plain(engine), kind), worst_difference(again, straight)


@pytest.mark.parametrize("kind, stage", [(ADAMW, 0), (ADAMW, 1), (MINI, 1), (MINI, 0), (LION, 1)])
def test_a_pipeline_trains_as_a_plain_optimizer_and_resumes(kind, stage, tmp_path):
    for worst, resumed in pool(4).run(trained_and_resumed, kind, stage, str(tmp_path)):
        assert worst < 1e-5 and resumed == 0.0


@pytest.mark.parametrize(
    "change, words",
    [
        ("model", ["is missing on rank 2 and 4.bias (24,) float32, trained on rank 3"]),
        ("ratios", ["block_lr_ratios is", "on ranks 0-2 and", "on rank 3"]),
    ],
)
def test_stages_may_differ_and_their_copies_may_not(change, words):
    errors = pool(4).run(engine_of, ADAMW, 1, change, errors=True)
    assert len({str(error) for error in errors}) == 1
    for word in words:
        assert word in str(errors[0])
