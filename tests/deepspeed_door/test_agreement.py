"""Ranks that would not train alike are refused on every rank with one sentence, before anything hangs."""

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import LR, config, start
from ranks import pool
from twins import make

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"


def our_object(model, **settings):
    import blockwise_lr

    block_map = blockwise_lr.map_blocks(model)
    return blockwise_lr.BlockwiseAdamW(model.named_parameters(), lr=LR, block_map=block_map, **settings)


def on_one_rank(kind, stage, change):
    """Starts an engine whose last rank differs by ``change``."""
    settings, model, arguments = config(kind, stage), make("llama"), {}
    params = settings["optimizer"]["params"]
    odd = dist.get_rank() == dist.get_world_size() - 1
    if change == "objects":
        settings.pop("optimizer"), settings.pop("scheduler")
        arguments["optimizer"] = our_object(model, block_lr_ratios={"qk": 7.0 if odd else 8.0})
    elif change == "functions":
        settings.pop("optimizer"), settings.pop("scheduler")
        arguments["optimizer"] = lambda params: torch.optim.AdamW(params, lr=LR) if odd else our_object(model)
    elif change == "generators":
        arguments["model_parameters"] = (p for p in model.parameters() if p.dim() > 1 or not odd)
    elif change == "group settings":
        arguments["model_parameters"] = [{"params": list(model.parameters()), "weight_decay": 0.2 if odd else 0.1}]
    elif odd:
        if change == "ratios":
            params["block_lr_ratios"] = {"qk": 2.0}
        elif change in ("betas", "weight_decay", "lr", "eps"):
            params[change] = {"betas": [0.9, 0.99], "weight_decay": 0.3, "lr": 1e-4, "eps": 1e-3}[change]
        elif change == "class":
            settings["optimizer"]["type"] = MINI if kind == ADAMW else ADAMW
        elif change == "deepspeed's AdamW":
            settings["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}}
            settings.pop("scheduler")
        elif change == "object":
            settings.pop("optimizer"), settings.pop("scheduler")
            arguments["optimizer"] = torch.optim.AdamW(model.parameters(), lr=LR)
        elif change == "unknown class":
            settings["optimizer"]["type"] = "BlockwiseAdamX"
        elif change == "scheduler":
            settings["scheduler"] = {"type": "WarmupLR", "params": {}}
        elif change == "scheduler params":
            settings["scheduler"]["params"]["warmup_num_steps"] = 5
        elif change == "no scheduler":
            settings.pop("scheduler")
        elif change == "clipping":
            settings["gradient_clipping"] = 2.0
        elif change == "stage":
            settings["zero_optimization"]["stage"] = 3 - stage
        elif change == "nvme":
            settings["zero_optimization"].update(offload_optimizer={"device": "nvme", "nvme_path": "/nowhere"})
        elif change == "frozen":
            model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        elif change == "dtype":
            model.model.norm.to(torch.bfloat16)
        elif change == "shape":
            model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
        elif change == "name":
            model.model.layers[0].mlp.add_module("up_projection", model.model.layers[0].mlp._modules.pop("up_proj"))
        elif change == "order":
            mlp = model.model.layers[0].mlp
            mlp._modules = dict(sorted(mlp._modules.items(), reverse=True))
        elif change == "layers":
            model.model.layers = model.model.layers[:1]
        else:
            raise AssertionError(change)
    start(model, settings, **arguments)


@pytest.mark.parametrize(
    "kind, stage, change, words",
    [
        (ADAMW, 2, "ratios", ['optimizer.params.block_lr_ratios is "paper" on rank 0 and', '"qk": 2.0', "on rank 1"]),
        (MINI, 1, "betas", ["optimizer.params.betas is [0.9, 0.95] on rank 0 and [0.9, 0.99] on rank 1"]),
        (ADAMW, 0, "weight_decay", ["optimizer.params.weight_decay is 0.1 on rank 0 and 0.3 on rank 1"]),
        (MINI, 3, "lr", ["optimizer.params.lr is 0.002 on rank 0 and 0.0001 on rank 1"]),
        (ADAMW, 1, "class", ["the optimizer is BlockwiseAdamW of the ds_config on rank 0 and BlockwiseAdamMini"]),
        (
            ADAMW,
            1,
            "deepspeed's AdamW",
            ["BlockwiseAdamW of the ds_config on rank 0 and adamw of the ds_config on rank 1"],
        ),
        (MINI, 2, "object", ["BlockwiseAdamMini of the ds_config on rank 0 and an object of class AdamW on rank 1"]),
        (MINI, 2, "unknown class", ["BlockwiseAdamX of the ds_config on rank 1"]),
        (ADAMW, 1, "objects", ["block_lr_ratios of param group 0", '"qk": 8.0', '"qk": 7.0']),
        (ADAMW, 1, "functions", ["the optimizer is of class BlockwiseAdamW on rank 0 and of class AdamW on rank 1"]),
        (
            ADAMW,
            2,
            "generators",
            ["the parameters of param group 0 is 21 parameters", "16 parameters", "same param groups"],
        ),
        (ADAMW, 2, "group settings", ["weight_decay of param group 0 is 0.1 on rank 0 and 0.2 on rank 1"]),
        (ADAMW, 1, "scheduler", ['scheduler.type is "BlockwiseWarmupCosine" on rank 0 and "WarmupLR" on rank 1']),
        (ADAMW, 1, "scheduler params", ["scheduler.params.warmup_num_steps is 3.0 on rank 0 and 5.0 on rank 1"]),
        (ADAMW, 1, "no scheduler", ['scheduler.type is "BlockwiseWarmupCosine" on rank 0 and null on rank 1']),
        (ADAMW, 1, "clipping", ["gradient_clipping is 0.5 on rank 0 and 2.0 on rank 1"]),
        (ADAMW, 1, "stage", ["zero_optimization.stage is 1.0 on rank 0 and 2.0 on rank 1"]),
        (ADAMW, 1, "nvme", ["offload_optimizer to nvme"]),
        (
            ADAMW,
            2,
            "frozen",
            [
                "parameter 15 of the model is model.layers.1.mlp.up_proj.weight (44, 32) float32, trained on rank 0",
                "frozen on rank 1",
                "before deepspeed.initialize",
            ],
        ),
        (MINI, 3, "dtype", ["model.norm.weight (32,) float32, trained on rank 0", "bfloat16, trained on rank 1"]),
        (ADAMW, 1, "shape", ["up_proj.weight (44, 32) float32, trained on rank 0 and", "(40, 32)"]),
        (ADAMW, 0, "name", ["up_proj.weight", "is model.layers.0.mlp"]),
        (MINI, 3, "order", ["parameter 5 of the model is model.layers.0.mlp.gate_proj.weight", "up_proj.weight"]),
        (ADAMW, 2, "layers", ["parameter 10 of the model is model.layers.1.self_attn.q_proj.weight", "on rank 1"]),
    ],
)
def test_a_rank_that_differs_is_refused_on_every_rank(kind, stage, change, words):
    errors = pool(2).run(on_one_rank, kind, stage, change, errors=True)
    assert len({str(error) for error in errors}) == 1
    assert {type(error).__name__ for error in errors} <= {"BlockError", "CheckpointError"}, errors
    for word in words:
        assert word in str(errors[0])


def test_ranks_are_named_in_ranges():
    error = pool(3).run(on_one_rank, ADAMW, 1, "eps", errors=True)[0]
    assert "optimizer.params.eps is 1e-05 on ranks 0-1 and 0.001 on rank 2" in str(error)


def scheduler_errors(kind):
    """A client's scheduler function that fails on the last rank."""

    def make_scheduler(optimizer):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise KeyError("no such milestone")
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    settings = config(kind, 1)
    settings.pop("scheduler")
    start(make("llama"), settings, lr_scheduler=make_scheduler)


def test_a_schedulers_error_on_one_rank_reaches_all():
    for error in pool(2).run(scheduler_errors, ADAMW, errors=True):
        assert "building the learning rate scheduler failed on rank 1 of 2" in str(error)
        assert "no such milestone" in str(error)


def equal_but_written_otherwise():
    """1 for 1.0, a tuple for a list, other kernels, another place for monitors: nothing that changes the training."""
    settings = config(ADAMW, 1)
    if dist.get_rank() == 1:
        settings["optimizer"]["params"].update(betas=(0.9, 0.95), kernel="auto")
        settings["steps_per_print"] = 7
    engine = start(make("llama"), settings)
    engine.destroy()


def other_optimizers():
    """Engines without one of ours keep DeepSpeed's behaviour, also where settings differ."""
    settings = config(ADAMW, 1)
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": LR * (1 + dist.get_rank()), "torch_adam": True}}
    settings.pop("scheduler")
    engine = start(make("llama"), settings)
    engine.destroy()


def test_nothing_else_is_refused():
    pool(2).run(equal_but_written_otherwise)
    pool(2).run(other_optimizers)
