"""Users' naming rules: each is applied as written, or refused in a sentence that names rule, key, value and mend."""

import time

import pytest
import torch
from torch import nn
from twins import llama

from blockwise_lr import BlockError, map_blocks
from blockwise_lr.blocks.globs import matches
from blockwise_lr.blocks.rules import Rule
from blockwise_lr.blocks.user_rules import user_rules


@pytest.mark.parametrize(
    "rule, words",
    [
        ({"match": "*", "block": "mlp"}, ["block: unknown block type 'mlp'", "use one of embedding, "]),
        ({"match": "*", "block": ["ffn"]}, ["block is ['ffn']", "use one of embedding, "]),
        ({"match": "*", "block": "ffn", "split": ["q"]}, ['either "block" or "split"']),
        ({"match": "*"}, ['either "block" or "split"']),
        ({"match": "*", "blok": "ffn"}, ["unknown key 'blok'", "use match, block, "]),
        ({"block": "ffn"}, ["match is missing", "give a glob"]),
        ({"match": "", "block": "ffn"}, ["match '' is empty", "give a glob"]),
        ({"match": 5, "block": "ffn"}, ["match is 5", "give a glob"]),
        ({"match": ["*"], "block": "ffn"}, ["match is ['*']", "give a glob"]),
        ({"match": "*\0", "block": "ffn"}, [r"match '*\x00' holds a control character", "take it out"]),
        ({"match": "{a,b", "block": "ffn"}, ["match '{a,b' has a brace without its partner", "{a,b}"]),
        ({"match": "a,b}", "block": "ffn"}, ["match 'a,b}' has a brace without its partner", "{a,b}"]),
        ({"match": "{a,{b,c}}", "block": "ffn"}, ["braces in braces"]),
        ({"match": "*." + "{a,b}" * 40, "block": "ffn"}, ["more than 256 combinations", "use * in place"]),
        ({"match": "*", "split": ["q", "w"]}, ["unknown role 'w'"]),
        ({"match": "*", "split": ["q", "k", "k"]}, ["names a role twice"]),
        ({"match": "*", "split": "qkv"}, ["split is 'qkv'", '["q", "k", "v"]']),
        ({"match": "*", "split": ["q", 1]}, ["split is 1", '["q", "k", "v"]']),
        ({"match": "*", "split": ["q", "k"], "heads": "q"}, ['leave it out beside "split"']),
        ({"match": "*", "block": "qk", "interleave": "head"}, ['leave it out beside "block"']),
        ({"match": "*", "split": ["q", "k"], "interleave": "rows"}, ["interleave is 'rows'", '"group"']),
        ({"match": "*", "block": "qk", "heads": True}, ["heads is True", '"kv"']),
        ({"match": "*", "block": "ffn", "transposed": "false"}, ["transposed is 'false'", "without quotes"]),
        ({"match": "*", "block": "ffn", "transposed": 1}, ["transposed is 1", "true or false"]),
        ({"match": "*", "block": "ffn", "batch_dims": -1}, ["batch_dims is -1", "whole number from 0"]),
        ({"match": "*", "block": "ffn", "batch_dims": True}, ["batch_dims is True", "whole number from 0"]),
        ({"match": "*", "block": "ffn", "batch_dims": "1"}, ["batch_dims is '1'", "without quotes"]),
        ({"match": "*", "block": "ffn", "batch_dims": 1.0}, ["batch_dims is 1.0", "whole number from 0"]),
        ({"match": "*", "block": "ffn", "batch_dims": 10**5000}, ["batch_dims is", "whole number from 0"]),
        ("*.adapter.*", ["'*.adapter.*' is no object", '{"match": ']),
        (None, ["None is no object", '{"match": ']),
    ],
)
def test_bad_rules(rule, words):
    with pytest.raises(BlockError) as error:
        user_rules([rule])
    assert all(text in str(error.value) for text in ["block rule ", *words]), error.value
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("rules", ["*.adapter.*", {"match": "*", "block": "ffn"}, 5, True])
def test_what_is_no_list_of_rules(rules):
    with pytest.raises(BlockError, match="block_rules must be a list of rules like"):
        user_rules(rules)


@pytest.mark.parametrize(
    "rule, words",
    [
        ({"match": "*.none.*", "block": "ffn"}, ["'*.none.*' matches no trainable parameter"]),
        (
            {"match": "*.mystery.weight", "block": "ffn", "batch_dims": 2},
            ["batch_dims is 2", "none of its 2 dimensions"],
        ),
        (
            {"match": "*.mystery.weight", "block": "ffn", "batch_dims": 7},
            ["batch_dims is 7", "none of its 2 dimensions"],
        ),
        ({"match": "*.mystery.bias", "block": "ffn", "batch_dims": 1}, ["batch_dims is 1", "none of its 1 dimensions"]),
        ({"match": "*.mystery.*", "block": "qk", "heads": "q"}, ["10 rows do not divide into 4 heads"]),
        (
            {"match": "*.mystery.*", "block": "qk", "heads": "kv", "transposed": True},
            ["7 rows do not divide into 2 heads"],
        ),
        ({"match": "*.mystery.*", "split": ["q", "k", "v"]}, ["10 rows do not divide into 8 heads"]),
        ({"match": "*.mystery.*", "split": ["q", "k", "v"], "interleave": "head"}, ["rows do not divide into 8 heads"]),
    ],
)
def test_rules_that_fit_no_parameter_or_not_the_one_they_match(rule, words):
    model = llama()
    model.mystery = nn.Linear(7, 10)
    wanted = (
        words
        if "none" in rule["match"]
        else [f"block rule {rule['match']!r} does not fit mystery.", "of shape (1", *words]
    )
    with pytest.raises(BlockError) as error:
        map_blocks(model, rules=[rule])
    assert all(text in str(error.value) for text in wanted), error.value


def test_a_rule_that_needs_heads_of_a_model_that_states_none():
    model = nn.ModuleDict({"fused": nn.Linear(4, 12, bias=False)})
    with pytest.raises(
        BlockError, match=r"block rule '\*.fused.weight' does not fit fused.weight of shape \(12, 4\): it needs "
    ):
        map_blocks(model, rules=[{"match": "*.fused.weight", "split": ["q", "k", "v"], "interleave": "group"}])


@pytest.mark.parametrize(
    "glob, matched, not_matched",
    [
        ("*.a", ["a", "x.a", "x.y.a", "x\n.a"], ["xa", "a.b", "x.ab"]),
        ("a*b", ["ab", "axb", "a.x.b"], ["xab", "abx"]),
        ("x{,_bias}", ["x", "x_bias"], ["x_", "x,_bias"]),
        ("*.{a,b.c}.{d,e}", ["a.d", "y.b.c.e"], ["y.b.d", "y.{a,b.c}.d"]),
        ("a?[bc]!", ["a?[bc]!"], ["axb!", "axc!", "a?b!"]),
        ("a,b", ["a,b"], ["a", "b"]),
        ("a.b", ["a.b"], ["axb"]),
        ("****", ["", "anything.at.all"], []),
    ],
)
def test_what_globs_match(glob, matched, not_matched):
    assert [name for name in matched + not_matched if matches(glob, name)] == matched


@pytest.mark.parametrize("glob", ["*" * 40 + "z", "*a" * 40 + "b", "*a*b" * 30 + "*c", "{*a*a,*a*b}" * 6 + "z"])
def test_matching_takes_linear_time(glob):
    """Fifty names of 20,000 characters in a second; a backtracking match does not end."""
    name, start = "a" * 20_000, time.monotonic()
    assert not any(matches(glob, f"{name}.{number}") for number in range(50 if "{" not in glob else 1))
    assert time.monotonic() - start < 5


def stored(**shapes):
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()})


def test_a_transposed_rule_may_match_biases_too():
    """A bias has no input axis, so its elements are the columns of its weight."""
    model = nn.ModuleDict({"fused": stored(weight=(8, 12), bias=(12,))})
    model.config = {"num_attention_heads": 2}
    mapped = map_blocks(model, rules=[{"match": "*.fused.*", "split": ["q", "k", "v"], "transposed": True}])
    assert [(layout.kind, layout.outputs, [piece.size for piece in layout.pieces]) for layout in mapped.values()] == [
        ("bias", 12, [4, 4, 4]),
        ("matrix", 12, [4, 4, 4]),
    ]


def test_stacked_vectors_are_vectors():
    mapped = map_blocks(stored(bias=(3, 8), weight=(3, 8, 4)), rules=[{"match": "*", "block": "ffn", "batch_dims": 1}])
    assert {name: (layout.kind, layout.batch, layout.outputs) for name, layout in mapped.items()} == {
        "bias": ("bias", 3, 8),
        "weight": ("matrix", 3, 8),
    }


def test_a_rule_of_a_table_that_says_no_block():
    with pytest.raises(BlockError, match="has no block, split or special"):
        Rule("*.proj.weight").layout("layers.0.proj.weight", (4, 4), None)
