"""An optimizer is one rule: what follows from it, also for a rule of the user's own, and how states go from one to another."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from kinds import KINDS
from twins import make

from blockwise_lr import BlockError, BlockwiseAdamMini, BlockwiseAdamW, BlockwiseLion, map_blocks
from blockwise_lr.checkpoint import CheckpointError, MismatchError
from blockwise_lr.optim import BlockwiseOptimizer, optimizer_class
from blockwise_lr.rules import RULES, OptimizerOptions, State, UpdateRule
from blockwise_lr.rules.options import NotNegative


class MomentumOptions(OptimizerOptions):
    """Those of the rule below."""

    momentum: NotNegative = 0.9


class Momentum(UpdateRule):
    """p <- p (1 - lr wd); m <- mu m + g; p <- p - lr m: torch.optim.SGD with decoupled decay."""

    name = "test_momentum"
    title = "TestMomentum"
    Options = MomentumOptions
    positional = ("lr", "momentum")
    states = (State("momentum_buffer"),)

    def scalars(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        return (group["momentum"],)

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Sequence[torch.Tensor],
        lr: float,
        decay: float,
        scalars: Sequence[float],
    ) -> None:
        param.mul_(1 - lr * decay)
        states[0].mul_(scalars[0]).add_(grad)
        param.add_(states[0], alpha=-lr)


OWN = optimizer_class(RULES.pop("test_momentum"))  # not among the built-in ones, over which other tests run


def steps(model, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_rule_of_ones_own_makes_an_optimizer(kernel):
    model, plain = make("llama"), make("llama")
    ratios = {"embedding": 2.0, "qk": 3.0, "ffn": 1.0, "vo": 0.5, "norm": 1.0}
    ours = OWN(model.named_parameters(), 1e-2, 0.8, block_lr_ratios=ratios, weight_decay=0.0, kernel=kernel)
    rates = {"embed_tokens": 2.0, "lm_head": 2.0, "q_proj": 3.0, "k_proj": 3.0, "v_proj": 0.5, "o_proj": 0.5}
    groups = [
        {"params": [p], "lr": 1e-2 * next((rate for part, rate in rates.items() if part in name), 1.0)}
        for name, p in plain.named_parameters()
    ]
    theirs = torch.optim.SGD(groups, lr=1e-2, momentum=0.8, foreach=False)
    steps(model, ours, range(4))
    steps(plain, theirs, range(4))
    assert torch.equal(weights(model), weights(plain))


def test_its_states_are_saved_checked_and_come_back():
    model = make("llama")
    ours = OWN(model.named_parameters(), lr=1e-2)
    steps(model, ours, range(2))
    assert set(ours.state_dict()["state"][0]) == {"step", "momentum_buffer"}
    again = copy.deepcopy(model)
    fresh = OWN(again.named_parameters(), lr=1e-2)
    fresh.load_state_dict(copy.deepcopy(ours.state_dict()))
    steps(model, ours, range(2, 4))
    steps(again, fresh, range(2, 4))
    assert torch.equal(weights(model), weights(again))


def test_signature_and_documentation_follow_from_the_options():
    assert list(inspect.signature(OWN).parameters)[:4] == ["params", "lr", "momentum", "block_map"]
    assert inspect.signature(BlockwiseLion).parameters["betas"].default == (0.95, 0.98)
    for kind in KINDS.values():
        for name, field in kind.optimizer.Options.model_fields.items():
            assert field.description, name
            assert f"    {name}: " in kind.optimizer.__doc__ or name == "block_strict", name
    with pytest.raises(TypeError, match="takes params, lr, momentum by position and everything else by name"):
        OWN(make("llama").named_parameters(), 1e-2, 0.8, 0.1)
    with pytest.raises(BlockError, match="unknown parameter 'momentun' .did you mean 'momentum'"):
        OWN(make("llama").named_parameters(), momentun=0.8)
    with pytest.raises(BlockError, match="unknown parameter 'eps'"):
        BlockwiseLion(make("llama").named_parameters(), eps=1e-8)


def test_holding_steps_may_be_nested():
    model = make("llama")
    optimizer = BlockwiseAdamW(model.named_parameters())
    before = weights(model)
    with BlockwiseOptimizer.holding_steps():
        with BlockwiseOptimizer.holding_steps():
            steps(model, optimizer, range(1))
        steps(model, optimizer, range(1))
    assert torch.equal(weights(model), before)
    steps(model, optimizer, range(1))
    assert not torch.equal(weights(model), before)


# ---- states of one rule in another

ALL = ["optimizer", "betas", "lr", "weight_decay"]


@pytest.mark.parametrize("saving", [BlockwiseAdamW, BlockwiseAdamMini])
def test_lion_goes_on_from_adams_first_moment(saving, caplog):
    model = make("llama")
    first = saving(model.named_parameters(), lr=1e-3, block_map=map_blocks(model))
    steps(model, first, range(3))
    saved = copy.deepcopy(first.state_dict())
    with pytest.raises(MismatchError, match=f"optimizer: {saving.__name__} -> BlockwiseLion"):
        BlockwiseLion(model.named_parameters()).load_state_dict(saved)
    lion = BlockwiseLion(model.named_parameters(), lr=1e-4, block_map=map_blocks(model), accept_mismatch=ALL)
    lion.load_state_dict(saved)
    for p in model.parameters():
        assert set(lion.state[p]) == {"step", "exp_avg"} and lion.state[p]["step"] == 3
        assert torch.equal(lion.state[p]["exp_avg"], first.state[p]["exp_avg"])
    assert (lion.param_groups[0]["lr"], lion.param_groups[0]["betas"]) == (1e-4, (0.95, 0.98))
    assert "eps" not in lion.param_groups[0]
    assert (
        f"a state saved by {saving.__name__} continues in BlockwiseLion: step counts and exp_avg are kept"
        in caplog.text
    )
    steps(model, lion, range(3, 4))


def test_adam_cannot_go_on_from_lion_which_has_no_second_moment():
    model = make("llama")
    lion = BlockwiseLion(model.named_parameters())
    steps(model, lion, range(2))
    adam = BlockwiseAdamW(model.named_parameters(), accept_mismatch=ALL)
    with pytest.raises(CheckpointError, match="where step, exp_avg and exp_avg_sq are needed.*load the weights alone"):
        adam.load_state_dict(lion.state_dict())
    assert not adam.state
