"""The step alone, on given gradients: against torch's AdamW, a loop over segments, and the official Adam-mini."""

import copy
import itertools
import random

import pytest
import torch
from kinds import KINDS, options_of
from optim.sharding import Shards
from twins import RATIOS, REFERENCES, Twin, llama, make, worst_difference

from blockwise_lr import BlockError, BlockwiseAdamMini, BlockwiseAdamW, map_blocks

LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-8


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return {
        n: torch.randn(p.shape, generator=generator) * 10 ** float(torch.rand((), generator=generator) * 6 - 3)
        for n, p in model.named_parameters()
    }


def flat_gradients(model, steps):
    return [torch.cat([grad.reshape(-1) for grad in gradients(model, step).values()]) for step in range(steps)]


def enough(kind):
    """Steps, of which at least three move the weights."""
    return 3 + KINDS[kind].idle


def whole(kind, model, steps=None, **settings):
    """The model's weights after steps of the optimizer on whole parameters."""
    optimizer = KINDS[kind].optimizer(
        model.named_parameters(),
        lr=LR,
        **options_of(kind, {"betas": BETAS, "eps": EPS, "weight_decay": DECAY}),
        block_map=map_blocks(model),
        **settings,
    )
    for step in range(enough(kind) if steps is None else steps):
        for name, p in model.named_parameters():
            p.grad = gradients(model, step)[name]
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def twin_weights(kind, model_kind):
    """The same steps on the unfused twin: its leaves' gradients are what autograd makes of the fused ones."""
    model = make(model_kind)
    twin = Twin(model_kind, model)
    optimizer = REFERENCES[kind](twin, BETAS, EPS, DECAY, RATIOS)
    for step in range(enough(kind)):
        given = gradients(model, step)
        sum((value * given[name]).sum() for name, value in twin.values().items()).backward()
        optimizer.step(lambda ratio: ratio * LR)
    return {n: v.detach() for n, v in twin.values().items()}


@pytest.mark.parametrize("model", ["llama", "llama_tied", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_steps_equal_the_plain_form(kind, model):
    found, wanted = whole(kind, make(model), kernel="reference"), twin_weights(kind, model)
    assert worst_difference(found, wanted) <= KINDS[kind].plain_error


@pytest.mark.parametrize("kernel", ["reference", "cpp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_any_cut_gives_the_unsharded_step(kind, model, kernel):
    rng = random.Random(1)
    wanted = torch.cat([p.reshape(-1) for p in whole(kind, make(model), kernel=kernel).values()])
    for trial in range(6):
        shards = Shards(
            make(model),
            sorted(rng.sample(range(1, wanted.numel()), trial)),
            KINDS[kind].optimizer,
            **options_of(kind, {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}),
            kernel=kernel,
        )
        shards.train(flat_gradients(make(model), enough(kind)), early=bool(trial % 2))
        assert float((shards.weights() - wanted).norm() / wanted.norm()) <= KINDS[kind].sharded_error


def copies_cut_apart(model, name, kernel, seed):
    """A parameter's copies after steps on two stages, cut by the shards of each at other places, and uncut."""
    draw = random.Random(seed)
    table = model.get_parameter(name)
    start = sum(p.numel() for n, p in itertools.takewhile(lambda pair: pair[0] != name, model.named_parameters()))
    width = table.shape[-1] if table.dim() > 1 else 1
    rows = draw.sample(range(table.shape[0]), 3)  # of a table, most edges lie in these, on both stages
    edges = [
        sorted(
            {
                *draw.sample(range(1, table.numel()), 2),
                *(row * width + draw.randrange(1, width) for row in rows for _ in range(2) if width > 1),
            }
        )
        for _ in range(2)
    ]
    stages = [
        Shards(
            model,
            [start + edge for edge in mine],
            BlockwiseAdamMini,
            name,
            others,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            block_lr_ratios="paper",
            kernel=kernel,
        )
        for mine, others in (edges, edges[::-1])
    ]
    for stage in stages:
        stage.train(flat_gradients(model, 3))
    return [
        *(stage.weights()[start : start + table.numel()].view_as(table) for stage in stages),
        whole("BlockwiseAdamMini", model, 3, kernel=kernel)[name],
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", ["reference", "cpp"])
@pytest.mark.parametrize(
    "model, name, to_the_bit",
    [
        ("llama_tied", "model.embed_tokens.weight", True),
        ("llama_tied", "model.norm.weight", True),
        (
            "gpt2",
            "transformer.h.0.mlp.c_fc.weight",
            False,
        ),  # transposed: stretches of its segments do not follow each other
    ],
)
def test_tied_weights_cut_at_different_places_stay_equal(model, name, to_the_bit, kernel, seed):
    """Copies of a weight on two pipeline stages, cut by the shards of each at other places, several times in a segment."""
    one, other, wanted = copies_cut_apart(make(model), name, kernel, seed)
    assert not to_the_bit or torch.equal(one, other)
    for found in (one, other):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("model", ["gpt2", "gpt_neox"])
def test_one_moment_per_bias_vector_under_any_cut(model):
    """A fused bias of q, k and v has three vectors, and under gpt_neox each is spread over the heads."""
    rng = random.Random(2)
    wanted = torch.cat(
        [p.reshape(-1) for p in whole("BlockwiseAdamMini", make(model), bias_segments="vector").values()]
    )
    for _ in range(6):
        shards = Shards(
            make(model),
            sorted(rng.sample(range(1, wanted.numel()), 20)),
            BlockwiseAdamMini,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            block_lr_ratios="paper",
            bias_segments="vector",
        )
        shards.train(flat_gradients(make(model), 3))
        assert float((shards.weights() - wanted).norm() / wanted.norm()) < 1e-6


def test_plain_adam_mini_is_the_official_one(capsys):
    """The official package, where its partition is the paper's: split q, k and v, one process."""
    from adam_mini import Adam_mini

    def llama_square():
        torch.manual_seed(0)
        return llama()

    model, theirs = llama_square(), llama_square()
    ours = BlockwiseAdamMini(
        model.named_parameters(),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        block_map=map_blocks(model),
        block_lr_ratios=dict.fromkeys(RATIOS, 1.0),
    )
    official = Adam_mini(
        theirs.named_parameters(),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        dim=32,
        n_heads=4,
        n_kv_heads=2,
        verbose=False,
    )
    for step in range(5):
        for (name, p), q in zip(model.named_parameters(), theirs.parameters()):
            p.grad, q.grad = gradients(model, step)[name], gradients(model, step)[name]
        ours.step()
        official.step()
    for (name, p), q in zip(model.named_parameters(), theirs.parameters()):
        assert float(((p - q).norm() / q.norm()).detach()) < 1e-6, name
    assert sum(s["exp_avg_sq"].numel() for s in ours.state.values()) == sum(
        s["vmean"].numel() for s in official.state.values()
    )


def test_names_alone_are_enough_for_adamw():
    model = make("llama")
    wanted = whole("BlockwiseAdamW", make("llama"))
    optimizer = BlockwiseAdamW(
        model.named_parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, block_lr_ratios="paper"
    )
    for step in range(3):
        for name, p in model.named_parameters():
            p.grad = gradients(model, step)[name]
        optimizer.step()
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())


def test_adam_mini_refuses_unknown_heads_and_transposed_names():
    with pytest.raises(BlockError, match="needs the number of heads"):
        BlockwiseAdamMini(make("llama").named_parameters())
    with pytest.raises(BlockError, match=r"looks transposed .* pass block_map=map_blocks\(model\)"):
        BlockwiseAdamW(make("gpt2").named_parameters())
    with pytest.raises(BlockError, match="pass block_map=map_blocks"):
        BlockwiseAdamW(make("llama").parameters())


def test_state_dicts_come_back_to_the_bit():
    for kind in (each.optimizer for each in KINDS.values()):
        model, again = make("gpt2"), make("gpt2")
        first = kind(model.named_parameters(), lr=LR, block_map=map_blocks(model), block_lr_ratios="paper")
        second = kind(again.named_parameters(), lr=LR, block_map=map_blocks(again), block_lr_ratios="paper")
        for step in range(4):
            for name, p in model.named_parameters():
                p.grad = gradients(model, step)[name]
            if step == 2:
                again.load_state_dict(model.state_dict())
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            first.step()
            if step >= 2:
                for name, p in again.named_parameters():
                    p.grad = gradients(model, step)[name]
                second.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_decay_of_everything_as_the_paper_does():
    model = make("gpt2")
    optimizer = BlockwiseAdamW(
        model.named_parameters(),
        lr=LR,
        weight_decay=0.5,
        decay_norms_and_biases=True,
        block_weight_decay={"vo": 0.25},
        block_lr_ratios="paper",
        block_map=map_blocks(model),
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    norm, output = "transformer.ln_f.weight", "transformer.h.0.attn.c_proj.weight"
    assert torch.allclose(after[norm], before[norm] * (1 - LR * 0.5))
    assert torch.allclose(after[output], before[output] * (1 - 4 * LR * 0.25))
