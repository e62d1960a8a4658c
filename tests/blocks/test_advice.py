"""Following an error's advice to the letter maps the model and changes nothing that was known."""

import pickle

import pytest
import torch
from blocks import zoo
from torch import nn
from twins import llama

from blockwise_lr import map_blocks
from blockwise_lr.blocks import UnmappedParameterError
from blockwise_lr.blocks.globs import matches


class Sinks(nn.Module):
    """An attention with parameters of its own beside the known ones, as GPT-OSS's sinks were once."""

    def __init__(self, inner):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj
        self.temperatures, self.mystery = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)


def strange():
    """A model with unknown parameters at the top, in every layer, and in a list."""
    model = llama()
    model.new_token = nn.Parameter(torch.zeros(1, 1, 32))
    for layer in model.model.layers:
        layer.self_attn = Sinks(layer.self_attn)
    model.extra = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])
    return model


def advice(model):
    with pytest.raises(UnmappedParameterError) as error:
        map_blocks(model)
    return error.value


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, lambda m: nn.ModuleDict({"module": m})])
def test_pasting_the_advice_maps_the_model_and_moves_nothing(wrap):
    model = wrap(strange())
    before = map_blocks(model, strict=False)
    found = advice(model)
    after = map_blocks(model, rules=found.rules)
    assert not after.unmapped and before.unmapped
    assert {n: p for n, p in after.items() if n not in before.unmapped} == {
        n: p for n, p in before.items() if n not in before.unmapped
    }


def test_the_advice_names_leaves_once_for_all_layers():
    error = advice(strange())
    assert error.rules == [
        {"match": "new_token", "block": "ffn"},
        {"match": "model.layers.*.self_attn.temperatures", "block": "vo"},
        {"match": "model.layers.*.self_attn.mystery.{weight,bias}", "block": "vo"},
        {"match": "extra.*", "block": "norm"},
    ]
    assert '{"match": "new_token", "block": "ffn"}' in str(error)
    again = pickle.loads(pickle.dumps(error))  # as it goes from rank to rank
    assert (str(again), again.rules) == (str(error), error.rules)


def test_where_a_star_would_take_what_is_known_names_are_exact():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Embedding(3, 3)])})
    assert advice(model).rules == [{"match": "a.0.weight", "block": "embedding"}]  # as what stands beside it
    assert not map_blocks(model, rules=advice(model).rules).unmapped


class Own(nn.Module):
    """A GPT of names that no table has, as a user's own may be."""

    def __init__(self):
        super().__init__()
        self.symbols, self.last = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.stack = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mix": nn.ModuleDict({"in_qkv": nn.Linear(32, 96), "back": nn.Linear(32, 32)}),
                    "wide": nn.ModuleDict({"grow": nn.Linear(32, 128), "shrink": nn.Linear(128, 32)}),
                }
            )
            for _ in range(2)
        )
        self.guess = nn.Linear(32, 64, bias=False)


def test_words_and_shapes_tell_a_fused_projection_and_an_output_layer():
    error = advice(Own())
    assert error.rules == [
        {"match": "stack.*.mix.in_qkv.{weight,bias}", "split": {"q": 1, "k": 1, "v": 1}},
        {"match": "stack.*.mix.back.{weight,bias}", "block": "vo"},
        {"match": "stack.*.wide.grow.{weight,bias}", "block": "ffn"},
        {"match": "stack.*.wide.shrink.{weight,bias}", "block": "ffn"},
        {"match": "guess.weight", "block": "head"},
    ]
    assert "they are guesses; blockwise-lr inspect --verify" in str(error)
    assert not map_blocks(Own(), rules=error.rules).unmapped
    grouped = Own()
    for layer in grouped.stack:
        layer["mix"]["in_qkv"] = nn.Linear(32, 64)  # of grouped queries: the smaller rate of the two
    assert advice(grouped).rules[0] == {"match": "stack.*.mix.in_qkv.{weight,bias}", "block": "vo"}


def test_rules_of_a_model_hold_for_it_with_frozen_layers_too():
    model = Own()
    rules = advice(model).rules
    for p in model.stack.parameters():
        p.requires_grad_(False)
    frozen = map_blocks(model, rules=rules)
    assert "stack.0.mix.back.weight" not in frozen
    frozen.unfreeze("stack.0.mix.back.weight")
    assert [str(b) for b in frozen["stack.0.mix.back.weight"].blocks] == ["vo"]


def everything():
    few = ("LlamaForCausalLM", "DeepseekV4ForCausalLM", "Blip2ForConditionalGeneration", "ViTMAEForPreTraining")
    return [
        pytest.param(name, marks=() if name in few else pytest.mark.full)
        for category in zoo.CATEGORIES
        for name in zoo.classes(category)
    ]


@pytest.mark.parametrize("name", everything())
def test_every_model_with_parameters_that_no_rule_knows(name):
    """A vector and a matrix of unheard-of names in every attention: the advice maps them, and the rest is as it was."""
    model = zoo.build(name)
    if model is None:
        pytest.skip("its default config builds no model here")
    attention = [m for m in model.modules() if type(m).__name__.endswith(("Attention", "MLP", "Embeddings"))]
    for number, module in enumerate(attention or [model]):
        module.register_parameter("unheard_of", nn.Parameter(torch.empty(3, 3 + number % 2, device="meta")))
        holder = nn.Module()
        holder.unheard_of = nn.Parameter(torch.empty(3, device="meta"))
        module.add_module("strange_holder", holder)
    before = map_blocks(model, strict=False)
    if not before.unmapped:
        pytest.skip("its classes say what all of these are")
    after = map_blocks(model, rules=advice(model).rules)
    assert {n: p for n, p in after.items() if n not in before.unmapped} == {
        n: p for n, p in before.items() if n not in before.unmapped
    }
    assert not any(
        matches(rule["match"], n) for rule in advice(model).rules for n in before if n not in before.unmapped
    )
