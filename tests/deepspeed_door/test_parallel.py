"""DeepSpeed's other kinds of parallelism (MoE, Ulysses, AutoTP): right beside plain optimizers, or refused."""
import logging
import types

import pytest
import torch
import torch.distributed as dist

from deepspeed_door.engines import CLIP, DECAY, EPS, LR, BETAS, config, reference
from ranks import pool
from twins import RATIOS, make, token_ids, worst_difference

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
WIDTH, VOCABULARY = 16, 24
RULES = [{"match": "*gate.wg.weight", "block": "router"}, {"match": "*experts.*", "block": "ffn"}]
BLOCKS = {"embed_tokens": "embedding", "lm_head": "head", "norm": "norm", "gate.wg": "router", "mlp": "ffn"}


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = torch.nn.Linear(WIDTH, 24)
        self.down_proj = torch.nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.up_proj(x)))


class Net(torch.nn.Module):
    """An embedding, feed-forward layers (of experts with ``ep_size``), a norm and a head."""

    def __init__(self, ep_size=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": self._mlp(ep_size)})])
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if "experts" in name:  # an expert is the same whatever rank it lies on
                here = dist.get_rank() if ep_size == 2 else 0
                number = int(name.split("deepspeed_experts.")[1].split(".")[0]) + here
                torch.manual_seed(10 + number)
                torch.nn.init.normal_(p, 0, 0.2)

    def _mlp(self, ep_size):
        if ep_size is None:
            return Expert()
        from deepspeed.moe.layer import MoE

        return MoE(WIDTH, Expert(), num_experts=2, ep_size=ep_size, k=1, drop_tokens=False, use_rts=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            out = layer["mlp"](x)
            x = x + (out[0] if isinstance(out, tuple) else out)
        logits = self.lm_head(self.norm(x))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class RowMini(torch.optim.Optimizer):
    """Adam-mini on whole tensors, written out: a second moment per row of a matrix, per norm, per element of a bias."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                axes = () if group["bias"] else tuple(range(1, p.dim())) or (0,)
                square = p.grad.square()
                mean = square.mean(axes, keepdim=True) if axes else square
                if not state:
                    state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(mean))
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["first"].lerp_(p.grad, 1 - BETAS[0])
                state["second"].lerp_(mean, 1 - BETAS[1])
                second = (state["second"] / (1 - BETAS[1] ** state["step"])).sqrt() + EPS
                p.sub_(group["lr"] / (1 - BETAS[0] ** state["step"]) * state["first"] / second)


def plain_groups(model):
    """A param group per tensor with its block type's learning rate and decay; experts apart, as DeepSpeed wants it."""
    found = []
    for name, p in model.named_parameters():
        block = next(block for part, block in BLOCKS.items() if part in name)
        bare = block == "norm" or name.endswith("bias")
        group = {"params": [p], "lr": LR * RATIOS.get(block, 1.0), "weight_decay": 0.0 if bare else DECAY, "name": name,
                 "bias": name.endswith("bias") and block != "norm"}
        if "experts" in name:
            group.update(moe=True, name=p.group_name)
        found.append(group)
    return found


def settings_of(kind, stage, model, parallel):
    made = config(kind, stage, gradient_accumulation_steps=1, optimizer={"block_lr_ratios": {"router": 1.0}},
                  scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": LR, "warmup_max_lr": LR,
                                                            "warmup_num_steps": 2, "warmup_type": "linear"}})
    if parallel.get("ep_size"):
        made["optimizer"]["params"]["block_rules"] = RULES
        made["gradient_clipping"] = 0.0  # DeepSpeed's own norms of MoE differ between its stages
    if not kind.startswith("Blockwise"):
        made.pop("optimizer"), made.pop("scheduler")
    return made


def sequence_mpu():
    """An mpu whose ranks share one sequence, as Megatron-DeepSpeed's."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    everyone = dist.new_group(list(range(dist.get_world_size())))
    groups = {"model_parallel": alone, "data_parallel": alone, "sequence_parallel": everyone,
              "sequence_data_parallel": everyone}
    asked = {}
    for name, group in groups.items():
        asked[f"get_{name}_group"] = lambda group=group: group
        asked[f"get_{name}_world_size"] = lambda group=group: dist.get_world_size(group)
        asked[f"get_{name}_rank"] = lambda group=group: dist.get_rank(group)
    return types.SimpleNamespace(**asked)


def engine_of(kind, stage, parallel):
    import deepspeed
    import blockwise_lr.deepspeed  # noqa: F401
    from deepspeed.utils import groups

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    groups.mpu = groups.mesh_device = None
    model = Net(parallel.get("ep_size"))
    arguments = {}
    if parallel.get("ulysses") == "mesh":
        arguments["mesh_param"] = (1, dist.get_world_size())
    elif parallel.get("ulysses") == "mpu":
        arguments["mpu"] = sequence_mpu()
    settings = settings_of(kind, stage, model, parallel)
    if kind in ("AdamW", "RowMini"):
        arguments["optimizer"] = {"AdamW": lambda g: torch.optim.AdamW(g, betas=BETAS, eps=EPS),
                                  "RowMini": lambda g: RowMini(g, {})}[kind](plain_groups(model))
    return deepspeed.initialize(model=model, config=settings, **arguments)[0]


def steps_of(engine, first, last):
    for number in range(first, last):
        ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2 * number + dist.get_rank()))
        engine.backward(engine(ids))
        engine.step()


def plain(engine):
    from deepspeed.utils import groups

    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    groups.mpu = groups.mesh_device = None
    return found


def beside_plain(kind, stage, parallel):
    """The worst difference from a plain optimizer on the whole tensors in the same kind of engine without ZeRO."""
    found = []
    for case in ((kind, stage), ({ADAMW: "AdamW", MINI: "RowMini"}[kind], 0)):
        engine = engine_of(*case, parallel)
        steps_of(engine, 0, 6)
        found.append(plain(engine))
    return worst_difference(*found)


MOE = [{"ep_size": 1}, {"ep_size": 2}]
ULYSSES = [{"ulysses": "mesh"}, {"ulysses": "mpu"}]


@pytest.mark.parametrize("kind", [ADAMW, MINI])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("parallel", MOE + ULYSSES, ids=str)
def test_moe_and_ulysses_train_as_a_plain_optimizer(kind, stage, parallel):
    assert max(pool(2).run(beside_plain, kind, stage, parallel)) < 1e-5
