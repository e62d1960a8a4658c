"""DeepSpeed's other kinds of parallelism (MoE, Ulysses, AutoTP): right beside plain optimizers, or refused."""

import logging

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import BETAS, CLIP, DECAY, EPS, LR, MIN_LR, WARMUP, config
from kinds import with_kinds
from ranks import pool
from references import once
from twins import RATIOS, TorchAdamW, Twin, make, paper_lr, token_ids, worst_difference

ADAMW, MINI, LION = "BlockwiseAdamW", "BlockwiseAdamMini", "BlockwiseLion"
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


class PlainLion(torch.optim.Optimizer):
    """Lion on whole tensors, written out."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    mixed = BETAS[0] * momentum + (1 - BETAS[0]) * p.grad
                    moved = (mixed > 0).float() - (mixed < 0).float() + group["weight_decay"] * p
                    p.sub_(group["lr"] * moved)
                    momentum.copy_(BETAS[1] * momentum + (1 - BETAS[1]) * p.grad)


def plain_groups(model):
    """A param group per tensor with its block type's learning rate and decay; experts apart, as DeepSpeed wants it."""
    found = []
    for name, p in model.named_parameters():
        block = next(block for part, block in BLOCKS.items() if part in name)
        bare = block == "norm" or name.endswith("bias")
        group = {
            "params": [p],
            "lr": LR * RATIOS.get(block, 1.0),
            "weight_decay": 0.0 if bare else DECAY,
            "name": name,
            "bias": name.endswith("bias") and block != "norm",
        }
        if "experts" in name:
            group.update(moe=True, name=p.group_name)
        found.append(group)
    return found


def settings_of(kind, stage, model, parallel):
    made = config(
        kind,
        stage,
        gradient_accumulation_steps=1,
        optimizer={"block_lr_ratios": {"preset": "paper", "router": 1.0}},
        scheduler={
            "type": "WarmupLR",
            "params": {"warmup_min_lr": LR, "warmup_max_lr": LR, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
    )
    if parallel.get("ep_size"):
        made["optimizer"]["params"]["block_rules"] = RULES
        made["gradient_clipping"] = 0.0  # DeepSpeed's own norms of MoE differ between its stages
    if not kind.startswith("Blockwise"):
        made.pop("optimizer"), made.pop("scheduler")
    return made


def sequence_mpu():
    """DeepSpeed's own mpu for Ulysses, all ranks sharing one sequence."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(dist.get_world_size())
    return parallel_state_sp


def engine_of(kind, stage, parallel):
    import deepspeed
    from deepspeed.utils import groups

    import blockwise_lr.deepspeed  # noqa: F401

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
    if kind in PLAIN_OF.values():
        arguments["optimizer"] = {
            "AdamW": lambda g: torch.optim.AdamW(g, betas=BETAS, eps=EPS),
            "RowMini": lambda g: RowMini(g, {}),
            "PlainLion": lambda g: PlainLion(g, {}),
            "SkippedRAdam": lambda g: SkippedRAdam(g, betas=BETAS, eps=EPS, decoupled_weight_decay=True),
        }[kind](plain_groups(model))
    return deepspeed.initialize(model=model, config=settings, **arguments)[0]


class SkippedRAdam(torch.optim.RAdam):
    """With its first five steps, which it would take unrectified, at a rate of 0."""

    taken = 0

    def step(self, closure=None):
        self.taken += 1
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= self.taken > 5
        super().step(closure)
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = rate


PLAIN_OF = {ADAMW: "AdamW", MINI: "RowMini", LION: "PlainLion", "BlockwiseRAdam": "SkippedRAdam"}


def steps_of(engine, first, last):
    for number in range(first, last):
        seeded = torch.Generator().manual_seed(2 * number + dist.get_rank())
        ids = torch.randint(0, VOCABULARY, (2, 8), generator=seeded)
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
    for case in ((kind, stage), (PLAIN_OF[kind], 0)):
        engine = engine_of(*case, parallel)
        steps_of(engine, 0, 8 if "RAdam" in kind else 6)
        found.append(plain(engine))
    return worst_difference(*found, kind)


MOE = [{"ep_size": 1}, {"ep_size": 2}]
ULYSSES = {"ulysses": "mpu"}


@pytest.mark.parametrize(
    "kind, stage, parallel",
    with_kinds([(0, MOE[1]), (1, MOE[0]), (2, MOE[1]), (0, ULYSSES), (2, ULYSSES), (3, ULYSSES)]),
    ids=str,
)
def test_moe_and_ulysses_train_as_a_plain_optimizer(kind, stage, parallel):
    assert max(pool(2).run(beside_plain, kind, stage, parallel)) < 1e-5


def resumed(kind, stage, parallel, folder):
    """How far a run that was saved after three steps, and loaded into a new engine, is from one that was not."""
    from blockwise_lr.deepspeed import load_newest

    engine = engine_of(kind, stage, parallel)
    steps_of(engine, 0, 3)
    engine.save_checkpoint(folder)
    steps_of(engine, 3, 5)
    wanted = plain(engine)
    engine = engine_of(kind, stage, parallel)
    for p in engine.module.parameters():
        p.data.add_(0.1)
    path, _ = load_newest(engine, folder)
    assert path is not None
    steps_of(engine, 3, 5)
    return worst_difference(plain(engine), wanted)


@pytest.mark.parametrize(
    "kind, stage, parallel",
    [
        (ADAMW, 1, MOE[1]),
        (MINI, 2, MOE[1]),
        (MINI, 1, MOE[0]),
        (MINI, 0, MOE[1]),
        (MINI, 2, ULYSSES),
        (ADAMW, 3, ULYSSES),
        (MINI, 0, ULYSSES),
    ],
    ids=str,
)
def test_moe_and_ulysses_resume_to_the_bit(kind, stage, parallel, tmp_path):
    assert pool(2).run(resumed, kind, stage, parallel, str(tmp_path)) == [0.0, 0.0]


def through_the_mesh(kind):
    engine_of(kind, 1, {"ulysses": "mesh"})


def test_ulysses_through_mesh_param_is_refused():
    """DeepSpeed averages gradients over the mesh's data-parallel ranks alone, also with torch's AdamW."""
    for error in pool(2).run(through_the_mesh, MINI, errors=True):
        assert "sequence-parallel ranks of mesh_param" in str(error) and "mpu" in str(error)


# ---- AutoTP

AUTOTP = {"tensor_parallel": {"autotp_size": 2}}


def even_llama(seed=0):
    """With a vocabulary that two ranks divide."""
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@once
def by_one_process():
    """The weights of even_llama after ten updates with torch's AdamW, a group per block type."""
    twin = Twin("llama", even_llama())
    optimizer = TorchAdamW(twin, BETAS, EPS, DECAY, RATIOS)
    for number, batch in enumerate(token_ids(10, 2, 1), 1):
        for part in batch:
            twin.backward(part[0], 0.5)
        twin.clip(CLIP)
        optimizer.step(lambda ratio: paper_lr(number, ratio, LR, MIN_LR, WARMUP, 10))
    return {name: value.detach() for name, value in twin.values().items()}


def tensor_parallel(stage, folder=None):
    """Trains with AutoTP, all ranks on the same tokens, and puts the slices together again."""
    from deepspeed_door.engines import start, weights

    engine = start(even_llama(), config(ADAMW, stage, **AUTOTP))
    data = token_ids(10, 2, 1)

    def train(first, last):
        for batch in data[first:last]:
            for part in batch:
                engine.backward(engine(part[0], labels=part[0]).loss)
                engine.step()

    train(0, 5)
    if folder is not None:
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = start(even_llama(seed=5), config(ADAMW, stage, **AUTOTP))
        assert engine.load_checkpoint(folder)[0] is not None
    train(5, 10)
    found, whole = {}, even_llama()
    for name, value in weights(engine).items():
        slices = [None, None]
        dist.all_gather_object(slices, value)
        shape = whole.get_parameter(name).shape
        axis = next((axis for axis in range(len(shape)) if value.shape[axis] != shape[axis]), None)
        found[name] = value if axis is None else torch.cat(slices, axis)
    engine.destroy()
    return worst_difference(found, by_one_process())


def autotp_start(kind, model_kind):
    from deepspeed_door.engines import start

    start(make(model_kind), config(kind, 1, **AUTOTP))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autotp_with_adamw_equals_torch_with_a_group_per_block(stage):
    assert max(pool(2).run(tensor_parallel, stage)) < 1e-5


def test_autotp_resumes(tmp_path):
    assert max(pool(2).run(tensor_parallel, 1, str(tmp_path))) < 1e-5


@pytest.mark.parametrize(
    "kind, model, words",
    [
        (MINI, "llama", ["BlockwiseAdamMini does not support tensor_parallel.autotp_size", "use BlockwiseAdamW"]),
        (ADAMW, "llama", ["a tensor-parallel slice is lm_head.weight (31, 32) on rank 0 and lm_head.weight (30, 32)"]),
        (ADAMW, "gpt_neox", ["query_key_value.weight holds several block types (qk, vo)", "separate weights"]),
    ],
)
def test_autotp_is_refused_where_slices_are_not_what_the_map_says(kind, model, words):
    errors = pool(2).run(autotp_start, kind, model, errors=True)
    assert len({str(error) for error in errors}) == 1
    for word in words:
        assert word in str(errors[0])
