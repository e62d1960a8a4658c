"""What torch.optim.AdamW takes, every optimizer of ours takes with the same outcome; what it refuses is refused before
anything is touched. Each test runs over torch.optim.AdamW itself too, so that a wrong expectation shows."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from twins import make

from blockwise_lr import map_blocks
from blockwise_lr.optim import CLASSES
from blockwise_lr.schedules import BlockwiseWarmupCosine

LR, BETAS, EPS, DECAY = 2e-3, (0.9, 0.95), 1e-8, 0.1
SAME = {"embedding": 1.0, "head": 1.0, "qk": 1.0, "vo": 1.0, "ffn": 1.0, "norm": 1.0}
KINDS = ["torch AdamW", *(f"{name}{kernel}" for name in CLASSES for kernel in ("", " cpp"))]
OURS = KINDS[1:]
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind, model, params=None, **options):
    """An optimizer; ours with one rate for all blocks and decay of everything, which makes AdamW of it."""
    params = model.named_parameters() if params is None else params
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, **options}
    if kind == "torch AdamW":
        return torch.optim.AdamW(params, foreach=False, **settings)
    cls = CLASSES[kind.removesuffix(" cpp")]
    settings["unrectified"] = "sgd"  # RAdam's first steps move weights too
    settings = {name: value for name, value in settings.items() if name in cls.Options.model_fields}
    return cls(
        params,
        block_map=map_blocks(model),
        block_lr_ratios=SAME,
        decay_norms_and_biases=True,
        kernel="cpp" if "cpp" in kind else "reference",
        **settings,
    )


def give_gradients(model, step, only=lambda name: True):
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad.to(p.dtype) if p.requires_grad and only(name) else None


def train(model, optimizer, steps, **arguments):
    for step in steps:
        give_gradients(model, step, **arguments)
        optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found, wanted, tolerance=0.0):
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


def as_torch_adamw(kind, run):
    """Runs something with an optimizer and with torch's AdamW, and compares where the two are one formula."""
    found = run(kind)
    if "AdamW" in kind:
        assert_equal(found, run("torch AdamW"), 0.0 if "cpp" not in kind else 1e-6)
    return found


# ---- copies and pickles


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_go_on_as_the_original(kind, how, scheduled):
    model = make("gpt2")
    optimizer = build(kind, model)
    if scheduled:  # a scheduler puts a method of its own in the optimizer
        BlockwiseWarmupCosine(optimizer, 10, 2)
    train(model, optimizer, range(2))
    again, copied = how((model, optimizer))
    train(again, copied, range(2, 5))
    before = weights(model)
    train(model, optimizer, range(2, 5))
    assert_equal(weights(again), weights(model))
    assert not torch.equal(weights(model)["transformer.wte.weight"], before["transformer.wte.weight"])
    assert "blockwise_lr record" not in repr(optimizer)


# ---- state dicts


def renumbered(state, model, optimizer):
    return {
        "state": {k + 100: v for k, v in state["state"].items()},
        "param_groups": [{**g, "params": [k + 100 for k in g["params"]]} for g in state["param_groups"]],
    }


def numbered_the_other_way(state, model, optimizer):
    last = max(k for g in state["param_groups"] for k in g["params"])
    return {
        "state": {last - k: v for k, v in state["state"].items()},
        "param_groups": [{**g, "params": [last - k for k in g["params"]]} for g in state["param_groups"]],
    }


def shuffled_states(state, model, optimizer):
    items = list(state["state"].items())
    random.Random(0).shuffle(items)
    return {**state, "state": dict(items)}


@kinds
@pytest.mark.parametrize("change", [lambda s, m, o: s, renumbered, numbered_the_other_way, shuffled_states])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_state_dicts_under_any_numbers(kind, change, family):
    model = make(family)
    optimizer = build(kind, model)
    train(model, optimizer, range(3))
    state, at3 = change(copy.deepcopy(optimizer.state_dict()), model, optimizer), weights(model)
    train(model, optimizer, range(3, 6))
    again = make(family, seed=1)
    again.load_state_dict(at3, strict=False)
    loaded = build(kind, again)
    loaded.load_state_dict(state)
    assert all(isinstance(key, torch.Tensor) for key in loaded.state)
    train(again, loaded, range(3, 6))
    assert_equal(weights(again), weights(model))


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flatten_optimizer_state_dict": True},
        {"full_state_dict": True},
        {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    ],
)
def test_state_dicts_of_torch_distributed_checkpoint(kind, options):
    options = StateDictOptions(**options)
    model = make("gpt2")
    optimizer = build(kind, model)
    train(model, optimizer, range(3))
    state, at3 = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options)), weights(model)
    train(model, optimizer, range(3, 6))
    again = make("gpt2", seed=1)
    again.load_state_dict(at3, strict=False)
    loaded = build(kind, again)
    set_optimizer_state_dict(again, loaded, state, options=options)
    train(again, loaded, range(3, 6))
    assert_equal(weights(again), weights(model))


@pytest.mark.parametrize("kind", OURS)
def test_states_follow_their_names_into_another_order_of_parameters(kind):
    """torch's AdamW would give each parameter the state of the one that had its number."""
    model = make("llama")
    optimizer = build(kind, model)
    train(model, optimizer, range(3))
    saved, at3 = copy.deepcopy(optimizer.state_dict()), weights(model)
    train(model, optimizer, range(3, 6))
    again = make("llama", seed=1)
    again.load_state_dict(at3)
    loaded = build(kind, again, list(again.named_parameters())[::-1])
    loaded.load_state_dict(saved)
    train(again, loaded, range(3, 6))
    assert_equal(weights(again), weights(model))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3)), "3"),
        (
            lambda s: s["state"][0].update({list(s["state"][0])[-1]: torch.zeros(7, 3)}),
            r"saved exp_avg\w* of .* \(7, 3\)",
        ),
        (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].T.clone()), "exp_avg of "),
        (lambda s: s["state"][0].pop("exp_avg"), r"where step(, exp_avg)? and exp_avg\w* are needed"),
        (lambda s: s.pop("param_groups"), "no state dict of an optimizer"),
        (lambda s: s["param_groups"][0]["params"].pop(), "param groups of"),
        (lambda s: s["param_groups"][0]["params"].__setitem__(0, 1), "twice"),
        (lambda s: s["param_groups"][0].update(blockwise_lr="blockwise_lr record !!"), "damaged"),
    ],
)
def test_damaged_states_are_refused_before_anything_is_loaded(kind, damage, words):
    model = make("llama")
    optimizer = build(kind, model)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][k][key], v[key]) for k, v in before["state"].items() for key in v)


@kinds
def test_load_hooks_see_the_state_as_it_was_given(kind):
    model = make("llama")
    optimizer = build(kind, model)
    train(model, optimizer, range(2))
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(list(s["state"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    optimizer.load_state_dict(saved)
    assert seen == [list(saved["state"]), "after"]


# ---- param groups


@kinds
def test_a_group_added_later_is_a_group_from_the_start(kind):
    def groups(model):
        named = list(model.named_parameters())
        return [{"params": named[:-2]}, {"params": named[-2:], "lr": LR / 2, "weight_decay": 0.3}]

    def run(kind, late):
        model = make("gpt_neox")
        first, second = groups(model)
        if late:
            optimizer = build(kind, model, [first])
            optimizer.add_param_group(second)
        else:
            optimizer = build(kind, model, [first, second])
        train(model, optimizer, range(3))
        return model, optimizer

    late, early = run(kind, True), run(kind, False)
    assert_equal(weights(late[0]), weights(early[0]))
    early[1].load_state_dict(late[1].state_dict())  # the run's own state, in the rebuilt run
    as_torch_adamw(kind, lambda kind: weights(run(kind, True)[0]))


@pytest.mark.parametrize("kind", OURS)
def test_a_groups_own_decay_holds_for_its_norms(kind):
    model = make("llama")
    named = dict(model.named_parameters())
    norm = ("model.norm.weight", named.pop("model.norm.weight"))
    cls = CLASSES[kind.removesuffix(" cpp")]
    options = {"unrectified": "sgd"} if "unrectified" in cls.Options.model_fields else {}
    optimizer = cls(list(named.items()), lr=LR, weight_decay=0.5, block_map=map_blocks(model), **options)
    optimizer.add_param_group({"params": [norm], "weight_decay": 0.25})
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(norm[1], before[norm[0]] * (1 - LR * 0.25), rtol=1e-7, atol=0)
    assert torch.equal(named["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"])


@kinds
def test_an_optimizer_built_from_anothers_groups_steps_alike(kind):
    model, again = make("llama"), make("llama")
    first = build(kind, model, weight_decay=0.5)
    groups = [
        {**{key: value for key, value in group.items() if key != "param_names"}, "params": list(again.parameters())}
        for group in first.param_groups
    ]
    second = type(first)(
        groups, **({} if kind == "torch AdamW" else {"block_map": map_blocks(again), "kernel": "reference"})
    )
    for optimizer, trained in ((first, model), (second, again)):
        train(trained, optimizer, range(2))
    assert_equal(weights(again), weights(model), 1e-6)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "group, words",
    [
        (
            {"params": [("elsewhere.table", torch.nn.Parameter(torch.zeros(3, 2)))]},
            "no block rule matches.*elsewhere.table",
        ),
        ({"params": [("new.q_proj.weight", torch.nn.Parameter(torch.zeros(3, 2)))], "lr": -1.0}, "lr is -1.0"),
        ({"params": [("new.q_proj.weight", torch.nn.Parameter(torch.zeros(8, 2)))], "amsgrad": True}, "amsgrad"),
        (
            {"params": [("new.q_proj.weight", torch.nn.Parameter(torch.zeros(8, 2)))], "weight_decy": 0.0},
            "did you mean 'weight_decay'",
        ),
    ],
)
def test_a_group_that_cannot_be_trained_is_refused_and_not_added(kind, group, words):
    model = make("llama")
    optimizer = build(kind, model)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", OURS)
def test_parameters_that_come_with_a_later_group_are_mapped_by_name(kind):
    model = make("llama")
    optimizer = build(kind, model)
    model.extra = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 8, bias=False)})
    optimizer.add_param_group({"params": [("extra.q_proj.weight", model.extra["q_proj"].weight)]})
    assert optimizer.block_map["extra.q_proj.weight"].blocks[0].value == "qk"
    train(model, optimizer, range(2))


@kinds
def test_what_torch_refuses_in_groups_is_refused(kind):
    model = make("llama")
    shared = next(iter(model.named_parameters()))
    for groups in (
        [{"params": [shared]}, {"params": [shared]}],
        [{"params": {torch.nn.Parameter(torch.zeros(2))}}],
        [],
    ):
        with pytest.raises((ValueError, TypeError)):
            build(kind, model, groups)
    with pytest.raises(TypeError):
        build(kind, model, shared[1])


# ---- what changes under an optimizer


@kinds
def test_parameters_can_be_unfrozen_later(kind):
    def run(kind):
        model = make("llama")
        table = model.get_parameter("model.layers.1.self_attn.q_proj.weight")
        table.requires_grad_(False)
        optimizer = build(kind, model)
        train(model, optimizer, range(2))
        frozen = table.detach().clone()
        table.requires_grad_(True)
        train(model, optimizer, range(2, 5))
        assert not torch.equal(table, frozen) and float(optimizer.state[table]["step"]) == 3
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return weights(model)

    as_torch_adamw(kind, run)


@pytest.mark.parametrize("kind", OURS)
def test_an_unknown_parameter_that_is_unfrozen_is_refused_before_the_step(kind):
    model = make("llama")
    model.strange = torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    optimizer = build(kind, model)
    train(model, optimizer, range(1))
    model.strange.requires_grad_(True)
    before = weights(model)
    with pytest.raises(ValueError, match="strange.*was frozen.*block_rules"):
        train(model, optimizer, range(1, 2))
    assert_equal(weights(model), before)


@kinds
@pytest.mark.parametrize("change", [lambda p: p.clone(), lambda p: p.T.contiguous().T])
def test_data_may_be_replaced_by_its_like(kind, change):
    def run(kind, changed=True):
        model = make("gpt2")
        optimizer = build(kind, model)
        train(model, optimizer, range(2))
        for p in model.parameters():
            if changed and p.dim() == 2:
                p.data = change(p.data)
        train(model, optimizer, range(2, 4))
        return weights(model)

    assert_equal(as_torch_adamw(kind, run), run(kind, False), 1e-7)


@kinds
@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "data", p.data[:3].clone()),
        lambda p: setattr(p, "data", torch.cat([p.data, p.data])),
        lambda p: setattr(p, "data", p.data.double()),
    ],
)
def test_data_of_another_size_or_type_is_refused(kind, change):
    model = make("llama")
    optimizer = build(kind, model)
    train(model, optimizer, range(2))
    change(model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    before = weights(model)
    with pytest.raises((ValueError, RuntimeError)):
        train(model, optimizer, range(2, 3))
    if kind != "torch AdamW":  # torch has stepped what comes before it
        assert_equal(weights(model), before)


@kinds
def test_parameters_and_gradients_need_not_be_contiguous(kind):
    def run(kind, contiguous=False):
        model = make("gpt2")
        if not contiguous:
            for p in model.parameters():
                if p.dim() == 2:
                    p.data = p.data.T.contiguous().T
        optimizer = build(kind, model)
        for step in range(3):
            give_gradients(model, step)
            for p in model.parameters():
                if not contiguous and p.dim() == 2 and step:
                    wide = torch.empty(*p.shape[:-1], 2 * p.shape[-1])
                    wide[:, ::2] = p.grad
                    p.grad = wide[:, ::2]
            optimizer.step()
        return weights(model)

    assert_equal(as_torch_adamw(kind, run), run(kind, True))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_complex_parameters(kind):
    def run(kind):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4)}).to(torch.complex64)
        optimizer = build(kind, model)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=torch.complex64)
            optimizer.step()
        return weights(model)

    as_torch_adamw(kind, run)


@pytest.mark.parametrize("kind", [name for name, cls in CLASSES.items() if not cls.rule.complex_as_pairs])
def test_other_rules_refuse_complex_parameters(kind):
    model = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(6, 4)}).to(torch.complex64)
    with pytest.raises(ValueError, match="up_proj.weight is complex"):
        CLASSES[kind](model.named_parameters())


@kinds
def test_sparse_gradients_are_refused_before_anything_is_touched(kind):
    model = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4), "wte": torch.nn.Embedding(8, 4, sparse=True)})
    optimizer = build(kind, model)
    before = weights(model)
    model["up_proj"](model["wte"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises((ValueError, RuntimeError), match="sparse"):
        optimizer.step()
    assert_equal(weights(model), before)
    assert kind == "torch AdamW" or not any(optimizer.state.values())


@kinds
def test_a_gradient_of_another_shape_is_refused(kind):
    model = make("llama")
    optimizer = build(kind, model)
    give_gradients(model, 0)
    p = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weights(model)
    with pytest.raises((ValueError, RuntimeError)):
        p.grad.data = torch.zeros(3, 3)
        optimizer.step()
    if kind != "torch AdamW":
        assert_equal(weights(model), before)


@kinds
@pytest.mark.parametrize("lr", [torch.tensor(LR), LR])
def test_rates_may_be_tensors_and_closures_are_called(kind, lr):
    def run(kind):
        model = make("llama")
        optimizer = build(kind, model, lr=lr.clone() if torch.is_tensor(lr) else lr)
        assert float(optimizer.step(lambda: (give_gradients(model, 0), torch.tensor(3.0))[1])) == 3.0
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        train(model, optimizer, range(1, 3))
        return weights(model)

    as_torch_adamw(kind, run)


@kinds
def test_empty_and_unused_parameters_stay(kind):
    model = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4), "down_proj": torch.nn.Linear(4, 0)})
    optimizer = build(kind, model)
    train(model, optimizer, range(2), only=lambda name: "bias" not in name)
    before = weights(model)
    train(model, optimizer, range(2, 4), only=lambda name: False)
    assert_equal(weights(model), before)
    assert model["up_proj"].bias not in optimizer.state or not optimizer.state[model["up_proj"].bias]


@kinds
def test_compiled_steps_are_the_steps(kind):
    def run(compiled):
        torch._dynamo.reset()
        model = make("llama")
        optimizer = build(kind, model)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(4):
            give_gradients(model, number)
            step()
        return weights(model)

    assert_equal(run(True), run(False), 1e-6 if kind == "torch AdamW" else 0.0)


# ---- states of flat shards are checked too


@pytest.mark.parametrize(
    "kind, key", [(f"{name} cpp", state.name) for name, cls in CLASSES.items() for state in cls.rule.states]
)
def test_a_state_of_another_size_never_reaches_a_kernel(kind, key):
    model = make("llama")
    optimizer = build(kind, model)
    train(model, optimizer, range(1))
    p = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    optimizer.state[p][key] = optimizer.state[p][key].reshape(-1)[:5].clone()
    before = weights(model)
    with pytest.raises(ValueError, match=f"up_proj.weight has no {key}"):
        train(model, optimizer, range(1, 2))
    assert_equal(weights(model), before)
