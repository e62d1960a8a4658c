"""BlockMap: names and shapes to block types, counted independently of the map."""

import pytest
import torch
from torch import nn
from twins import VOCABULARY, gpt2, gpt_neox, llama

from blockwise_lr import BlockError, BlockType, map_blocks
from blockwise_lr.blocks import UnmappedParameterError, lr_ratios


def counts(model):
    return {block.value: numel for block, numel in map_blocks(model).block_numel().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    table = VOCABULARY * 32
    wanted = {
        "embedding": table,
        "qk": 2 * (32 * 32 + 16 * 32),
        "vo": 2 * (16 * 32 + 32 * 32),
        "ffn": 2 * 3 * 44 * 32,
        "norm": 5 * 32,
    }
    assert counts(llama(tied)) == {**wanted, **({} if tied else {"head": table})}


def test_gpt2_columns_and_biases():
    model = gpt2()
    per_layer_norm = 4 * 24
    assert counts(model) == {
        "embedding": (VOCABULARY + 32) * 24,
        "qk": 2 * (2 * 24 * 24 + 2 * 24),
        "vo": 2 * (2 * 24 * 24 + 2 * 24),
        "ffn": 2 * (2 * 24 * 96 + 96 + 24),
        "norm": 2 * per_layer_norm + 48,
    }
    layout = map_blocks(model)["transformer.h.0.attn.c_attn.weight"]
    assert layout.transposed
    assert [(a, b, piece.block.value, piece.unit) for a, b, piece in layout.spans()] == [
        (0, 24, "qk", 6),
        (24, 48, "qk", 6),
        (48, 72, "vo", 1),
    ]


def test_gpt_neox_rows_per_head():
    layout = map_blocks(gpt_neox())["gpt_neox.layers.1.attention.query_key_value.weight"]
    assert [(a, b, piece.role) for a, b, piece in layout.spans()[:4]] == [
        (0, 8, "q"),
        (8, 16, "k"),
        (16, 24, "v"),
        (24, 32, "q"),
    ]
    assert len(layout.spans()) == 12 and not layout.transposed


def test_rows_called_v_are_the_value_path():
    """Zeroing exactly the v rows of the fused weights leaves attention without output, in the real modules."""
    for model, attention in ((gpt2(), "attn.c_proj"), (gpt_neox(), "attention.dense")):
        block_map = map_blocks(model)
        seen = {}
        for name, module in model.named_modules():
            if name.endswith(attention):
                module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                layout = block_map[name]
                for start, end, piece in layout.spans():
                    if piece.role == "v" and (p.dim() == 1 or not layout.transposed):
                        p[start:end] = 0
                    elif piece.role == "v":
                        p[:, start:end] = 0
            model(torch.arange(8)[None])
        assert len(seen) == 2 and all(value.abs().max() == 0 for value in seen.values())


def test_a_tied_head_is_the_embedding_whatever_comes_first():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 9, bias=False)
            self.wte = nn.Embedding(9, 4)
            self.wte.weight = self.lm_head.weight

    assert counts(HeadFirst()) == {"embedding": 36}


def test_frozen_parameters_need_no_rule():
    model = llama()
    model.mystery = nn.Linear(2, 2)
    model.mystery.requires_grad_(False)
    assert "mystery.weight" not in map_blocks(model)


def test_unknown_names_stop_with_the_rule_to_add():
    model = llama()
    model.mystery = nn.Linear(3, 5)
    with pytest.raises(UnmappedParameterError) as error:
        map_blocks(model)
    for words in (
        "mystery.weight",
        "(5, 3)",
        "1 more: mystery.bias",
        "nearest rule",
        '{"match": "mystery.{weight,bias}", "block": "ffn"}',
    ):
        assert words in str(error.value)
    assert map_blocks(model, rules=error.value.rules)["mystery.bias"].blocks == (BlockType.FFN,)
    assert map_blocks(model, strict=False).unmapped == {"mystery.weight", "mystery.bias"}


def test_a_users_rule_comes_first_and_can_describe_a_fused_weight():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"num_attention_heads": 4, "num_key_value_heads": 2}
            self.qkv = nn.Linear(8, (4 + 2 + 2) * 3, bias=False)

    layout = map_blocks(Odd(), rules=[{"match": "*.qkv.*", "split": ["q", "k", "v"], "interleave": "group"}])
    assert [(p.size, p.unit) for p in layout["qkv.weight"].pieces] == [(6, 3), (3, 3), (3, 1)]
    assert layout["qkv.weight"].repeat == 2


def test_wrappers_do_not_change_the_map():
    model = llama()
    wanted = [layout.pieces for layout in map_blocks(model).values()]
    assert [layout.pieces for layout in map_blocks(torch.compile(model)).values()] == wanted
    wrapped = nn.Module()
    wrapped.module = model
    assert [layout.pieces for layout in map_blocks(wrapped).values()] == wanted


def test_head_counts_that_do_not_fit_are_refused():
    with pytest.raises(BlockError, match="do not divide into 5 heads"):
        map_blocks(llama(), config={"num_attention_heads": 5})


def test_ratios_of_the_paper_and_where_nothing_is_said():
    named = {block.value: ratio for block, ratio in lr_ratios("paper").items()}
    assert named == {"embedding": 10, "head": 10, "qk": 8, "vo": 4, "ffn": 6, "norm": 1, "router": 6, "ssm": 6}
    ones = dict.fromkeys(("qk", "vo", "ffn", "norm", "router", "ssm"), 1)
    for nothing in (None, {}, "embedding"):
        assert {block.value: ratio for block, ratio in lr_ratios(nothing).items()} == {
            "embedding": 10,
            "head": 10,
            **ones,
        }
    assert lr_ratios({"embedding": 5})[BlockType.HEAD] == 5
    assert lr_ratios({"head": 1})[BlockType.EMBEDDING] == 10
    assert lr_ratios({"ffn": 6})[BlockType.SSM] == 6


def test_the_fingerprint_tells_layouts_apart():
    one, same = map_blocks(llama()).fingerprint(), map_blocks(llama()).fingerprint()
    other = map_blocks(llama(), config={"num_attention_heads": 2, "num_key_value_heads": 1}).fingerprint()
    assert one == same != other


def test_the_name_of_a_tensor_that_must_be_mapped():
    model = llama()
    block_map = map_blocks(model)
    assert block_map.require_name(model.model.norm.weight) == "model.norm.weight"
    with pytest.raises(BlockError, match=r"a tensor of shape \(32,\) is not in the block map"):
        block_map.require_name(model.model.norm.weight.detach().clone())
