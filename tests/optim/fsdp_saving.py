"""FSDP2 runs that save and load through torch.distributed.checkpoint; they run in the rank processes."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim.fsdp import layers, optimizer_of, step
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from twins import make, token_ids

from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, map_blocks

STEPS = 3


def build(family: str, kind: str, seed: int = 0, replicas: int = 1, rules=None):
    """Model and optimizer; sharded wherever there are several ranks, also over replicas (HSDP)."""
    model = make(family, seed=seed)
    ranks = dist.get_world_size()
    if ranks > 1:
        mesh = (
            init_device_mesh("cpu", (ranks,))
            if replicas == 1
            else init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
        )
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind == "AdamW":
        return model, torch.optim.AdamW(model.named_parameters(), lr=2e-3, eps=1e-5)
    return model, optimizer_of(model, kind, rules)


def train(model, optimizer, batches):
    for batch in batches:
        step(model, optimizer, batch)


def batches():
    """One batch of four micro batches a step: as many as divide over 1, 2 and 4 ranks."""
    return token_ids(2 * STEPS, 1, 4)[:, 0]


def whole(model) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def own(batches):
    """The part of every batch that falls to this rank's ``step``, which takes one micro batch a rank."""
    ranks = dist.get_world_size()
    return batches if ranks == 1 else batches[:, :ranks]


def save_and_go_on(family: str, kind: str, folder: str, flat: bool, replicas: int = 1, rules=None):
    """Weights at the save and at the end of an uninterrupted run."""
    model, optimizer = build(family, kind, replicas=replicas, rules=rules)
    train(model, optimizer, own(batches())[:STEPS])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.save(
        {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        },
        checkpoint_id=folder,
    )
    saved = states(model, optimizer)
    train(model, optimizer, own(batches())[STEPS:])
    return saved, whole(model)


def load_and_go_on(family: str, kind: str, folder: str, flat: bool, steps: bool = True, replicas: int = 1, rules=None):
    """The loaded states, and weights at the end, of a run that goes on from the checkpoint."""
    model, optimizer = build(family, kind, seed=1, replicas=replicas, rules=rules)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    loaded = states(model, optimizer)
    if steps:
        train(model, optimizer, own(batches())[STEPS:])
    return loaded, whole(model)


def states(model, optimizer) -> dict[str, torch.Tensor]:
    """Whole weights, first and second moments and steps; second moments as a state dict holds them, per output unit."""
    found = {f"{name} weight": value for name, value in whole(model).items()}
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    for name, state in full["state"].items():
        found.update({f"{name} {key}": torch.as_tensor(value).clone() for key, value in state.items()})
    return found


def full_states(family: str, kind: str, folder: str):
    """Saves a full (gathered) state dict as one file, and the weights of the run that goes on."""
    model, optimizer = build(family, kind)
    train(model, optimizer, own(batches())[:STEPS])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        torch.save((weights, state), folder + "/full.pt")
    dist.barrier()
    return states(model, optimizer)


def load_full(family: str, kind: str, folder: str, from_rank_0: bool = False):
    """Loads the full state dict, which the first rank alone may have."""
    model, optimizer = build(family, kind, seed=1)
    weights, state = torch.load(folder + "/full.pt", weights_only=True)
    if from_rank_0 and dist.get_rank() > 0:
        weights, state = {}, {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    return states(model, optimizer)


def copied(family: str, kind: str):
    """A copy of model and optimizer trains as the original."""
    model, optimizer = build(family, kind)
    train(model, optimizer, own(batches())[:2])
    again = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(again)
    train(model, optimizer, own(batches())[2:4])
    return whole(model)


def uninterrupted(family: str, kind: str, steps: int = 4):
    model, optimizer = build(family, kind)
    train(model, optimizer, own(batches())[:steps])
    return whole(model)


def fsdp1(use_orig_params: bool, named: bool) -> str:
    """What FSDP1's shards are answered with."""
    model = FullyShardedDataParallel(make("llama"), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    try:
        if named:
            BlockwiseAdamW(model.named_parameters(), lr=1e-3)
        else:
            BlockwiseAdamMini(model.parameters(), block_map=map_blocks(model))
    except ValueError as error:
        return str(error)
    return ""


def unlike_ranks(what: str) -> str:
    """Ranks that build other optimizers over the same sharded parameters."""
    rank = dist.get_rank()
    model = make("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    settings = {
        "ratios": {"block_lr_ratios": {"qk": 8.0 if rank == 0 else 4.0}},
        "lr": {"lr": 1e-3 * (1 + rank)},
        "bad": {"eps": -1.0 if rank == 1 else 1e-8},
        "class": {},
        "frozen": {},
    }[what]
    if what == "frozen" and rank == 1:
        model.get_parameter("model.norm.weight").requires_grad_(False)
    cls = BlockwiseAdamMini if what == "class" and rank == 1 else BlockwiseAdamW
    try:
        cls(model.named_parameters(), block_map=map_blocks(model), **settings)
    except ValueError as error:
        return str(error)
    return ""
