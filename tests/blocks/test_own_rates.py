"""Blocks and rates of the user's own: by name, by layer, by depth; numbers by hand, and splits beside the proven tables."""

import copy
import io

import pytest
import torch
import transformers
from torch import nn
from twins import llama, make

from blockwise_lr import BlockError, BlockType, BlockwiseAdamMini, BlockwiseAdamW, map_blocks
from blockwise_lr.blocks.depth import Depths, Layers, Place
from blockwise_lr.blocks.user_rules import user_rules
from blockwise_lr.inspection import inspect_model
from blockwise_lr.measure import AutoRatios
from blockwise_lr.transformers import BlockwiseAdamWFactory


class Sees(nn.Module):
    """A vision tower of three layers beside a language model of two; the tower's names as LLaVA's."""

    def __init__(self):
        super().__init__()
        vision = transformers.CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=8,
            patch_size=4,
        )
        self.vision_tower = transformers.CLIPVisionModel(vision)
        self.language_model = llama()


def optimizer_of(model, rules, **options):
    return BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(model, rules=rules), **options)


def rates(optimizer):
    """Name -> learning rate of each parameter of one class, as its next step is to use it."""
    found = {}
    group = optimizer.param_groups[0]
    for name, p in zip(group["param_names"], group["params"]):
        values = optimizer._values(group, optimizer.plan_of(p), 1)
        if len(set(values.lrs)) == 1:
            found[name] = values.lrs[0], values.decays[0]
    return found


def test_a_tower_is_a_block_of_its_own():
    model = Sees()
    tower = {"match": "vision_tower.*", "lr_ratio": 0.1}
    optimizer = optimizer_of(
        model, [tower], block_lr_ratios={"qk": 3}, block_weight_decay={"vision_tower": 0.3, "qk": 0.2}
    )
    found = rates(optimizer)
    for name, (lr, decay) in found.items():
        if name.startswith("vision_tower."):
            matrix = model.get_parameter(name).dim() > 1
            assert lr == pytest.approx(1e-4) and decay == (0.3 if matrix else 0.0), name
    lr, decay = found["language_model.model.layers.1.self_attn.k_proj.weight"]
    assert lr == pytest.approx(3e-3) and decay == 0.2
    now = optimizer.block_lrs()[0]
    assert now["vision_tower"] == pytest.approx(1e-4) and now["qk"] == pytest.approx(3e-3)
    elements = sum(p.numel() for p in model.vision_tower.parameters())
    assert f"vision_tower {elements:,} at 0.0001" in optimizer.describe()
    optimizer.set_block_lr_ratios({"vision_tower": 0.4})
    assert optimizer.block_lrs()[0]["vision_tower"] == pytest.approx(4e-4)
    optimizer.set_block_lr_ratios({"qk": 5})  # those not named stay
    assert optimizer.block_lrs()[0]["vision_tower"] == pytest.approx(4e-4)
    assert optimizer.block_lrs()[0]["qk"] == pytest.approx(5e-3)
    optimizer.set_block_lr_ratios("paper")
    assert optimizer.block_lrs()[0]["vision_tower"] == pytest.approx(1e-4)
    assert optimizer.block_lr_ratios["vision_tower"] == pytest.approx(0.1)


def test_a_named_block_takes_its_ratio_from_block_lr_ratios():
    model, rules = Sees(), [{"match": "vision_tower.*", "name": "eyes"}]
    assert optimizer_of(model, rules, block_lr_ratios={"eyes": 2}).block_lrs()[0]["eyes"] == pytest.approx(2e-3)
    with pytest.raises(BlockError, match="the block 'eyes' of block_rules has no ratio; add lr_ratio to its rule"):
        optimizer_of(model, rules)
    with pytest.raises(BlockError, match="unknown block type 'eye'; use one of embedding.*ssm, eyes"):
        optimizer_of(model, rules, block_lr_ratios={"eye": 2})
    by_name = BlockwiseAdamW(Sees().language_model.named_parameters(), block_rules=[{"match": "*mlp*", "lr_ratio": 2}])
    assert by_name.block_lrs()[0]["mlp"] == pytest.approx(2e-3)
    trainers = BlockwiseAdamWFactory()(model, lr=1e-3, block_rules=rules, block_lr_ratios={"eyes": 2, "qk": 1})
    assert trainers.block_lrs()[0]["eyes"] == pytest.approx(2e-3)
    groups = [{"params": model.named_parameters(), "block_lr_ratios": {"eyes": 3}}]
    own_group = BlockwiseAdamW(groups, lr=1e-3, block_map=map_blocks(model, rules=rules), block_lr_ratios={"eyes": 1})
    assert own_group.block_lrs()[0]["eyes"] == pytest.approx(3e-3)


def test_layer_wise_decay_is_that_of_beit():
    """Of L layers, numbered from 0, layer i has decay ** (L - i), the embeddings decay ** (L + 1), the rest 1; each tower
    by its own number of layers."""
    found = rates(optimizer_of(Sees(), [{"match": "*", "layer_decay": 0.5}], block_lr_ratios="uniform"))
    scales = {name: lr / 1e-3 for name, (lr, _) in found.items()}
    tower, text = "vision_tower.", "language_model.model."
    wanted = {
        f"{tower}embeddings.class_embedding": 0.5**4,
        f"{tower}pre_layrnorm.weight": 0.5**4,
        f"{tower}encoder.layers.0.mlp.fc1.weight": 0.5**3,
        f"{tower}encoder.layers.2.layer_norm1.weight": 0.5,
        f"{tower}post_layernorm.weight": 1.0,
        f"{text}embed_tokens.weight": 0.5**3,
        f"{text}layers.0.self_attn.q_proj.weight": 0.5**2,
        f"{text}layers.1.self_attn.q_proj.weight": 0.5,
        f"{text}norm.weight": 1.0,
        "language_model.lm_head.weight": 1.0,
    }
    inner = {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in scales.items()}
    assert {name: inner[name] for name in wanted} == pytest.approx(wanted)


def test_rates_of_scaled_blocks_are_told_by_their_ends():
    optimizer = optimizer_of(make("llama"), [{"match": "*", "layer_decay": 0.5}])
    now = optimizer.block_lrs()[0]
    assert (now["qk"], now["qk.lowest"]) == pytest.approx((5e-4, 2.5e-4)) and "head.lowest" not in now
    assert "qk 3,072 at 0.00025 to 0.0005" in optimizer.describe()


def test_the_first_rule_that_says_something_says_it():
    """A rate and a layout of one parameter may come from two rules, each from the first that has one."""
    model = make("llama")
    rules = [
        {"match": "*.layers.1.*", "lr_scale": 0.5},
        {"match": "*.mlp.*", "block": "vo", "lr_scale": 0.25},
        {"match": "*.mlp.up_proj.*", "block": "qk"},
        {"match": "*", "lr_ratio": 9, "name": "rest"},
    ]
    with pytest.raises(
        BlockError, match=r"'\*.mlp.up_proj.\*' matches no trainable parameter.*or only those of a rule before"
    ):
        map_blocks(model, rules=rules)
    mapped = map_blocks(model, rules=[rule for rule in rules if rule["match"] != "*.mlp.up_proj.*"])
    said = {
        name: (str(mapped[f"model.layers.{name}.weight"].blocks[0]), *mapped[f"model.layers.{name}.weight"].rate(block))
        for name, block in [
            ("0.mlp.up_proj", BlockType.VO),
            ("1.mlp.up_proj", BlockType.VO),
            ("0.self_attn.q_proj", BlockType.QK),
        ]
    }
    assert said == {
        "0.mlp.up_proj": ("vo", "vo", 0.25),
        "1.mlp.up_proj": ("vo", "vo", 0.5),
        "0.self_attn.q_proj": ("qk", "rest", 1.0),
    }


@pytest.mark.parametrize(
    "layers, wanted",
    [
        ("first", [0]),
        ("last", [4]),
        ("first 2", [0, 1]),
        ("last 2", [3, 4]),
        ("lower half", [0, 1]),
        ("upper half", [2, 3, 4]),
        ("1-2,4", [1, 2, 4]),
        ("3, 9", [3]),
    ],
)
def test_layers(layers, wanted):
    assert [index for index in range(5) if Layers(layers).hold(Place(index, 5))] == wanted
    assert (
        not Layers(layers).hold(Place(-1, 5)) and not Layers(layers).hold(Place(5, 5)) and not Layers(layers).hold(None)
    )


def test_what_is_a_layer():
    """No expert, no module of a classifier and no sublayer; layers whose number ends a word; frozen ones count."""
    qk, ffn = [BlockType.QK], [BlockType.FFN]
    blocks = {
        "h.2.attn.q": qk,
        "h.3.attn.q": qk,
        "h.3.experts.0.w": ffn,
        "h.3.experts.7.w": ffn,
        "stem.0.w": ffn,
        "stem.1.w": ffn,
    }
    depths = Depths(blocks, ["h.0.attn.q", "h.1.attn.q"])
    assert [depths.place(f"h.{n}.experts.7.w") for n in (0, 3)] == [Place(0, 4), Place(3, 4)]
    assert depths.place("head.0.w") == Place(4, 4) and depths.place("stem.1.w", [BlockType.EMBEDDING]) == Place(-1, 4)
    words = Depths({"layers.encoder_layer_0.self_attention.q": qk, "layers.encoder_layer_1.self_attention.q": qk}, [])
    assert words.place("layers.encoder_layer_1.mlp.0.w") == Place(1, 2)
    sublayers = Depths({f"block.{n}.layer.0.q": qk for n in range(2)}, [f"block.{n}.layer.1.w" for n in range(2)])
    assert sublayers.place("block.1.layer.0.q") == Place(1, 2)
    assert Depths({"w": ffn}, []).place("w") is None


def test_frozen_layers_count_and_may_be_trained_later():
    model, rules = make("llama"), [{"match": "*", "layer_decay": 0.5}]
    model.model.layers[0].requires_grad_(False)
    mapped = map_blocks(model, rules=rules)
    assert mapped["model.layers.1.mlp.up_proj.weight"].lr_scale == 0.5
    mapped.unfreeze("model.layers.0.mlp.up_proj.weight")
    assert mapped["model.layers.0.mlp.up_proj.weight"].lr_scale == 0.25


def test_inspect_shows_own_blocks_and_factors():
    rules = [
        {"match": "*.layers.*", "layers": "first", "name": "low", "lr_ratio": 0.5},
        {"match": "*", "layer_decay": 0.5},
    ]
    rows = {
        row.parameter: row
        for row in inspect_model(make("gpt2"), rules=[{**r, "match": r["match"].replace("layers", "h")} for r in rules])
    }
    assert (
        rows["transformer.h.0.mlp.c_fc.weight"].block == "low" and rows["transformer.h.0.mlp.c_fc.weight"].ratio == 0.5
    )
    assert (
        rows["transformer.h.1.mlp.c_fc.weight"].block == "ffn" and rows["transformer.h.1.mlp.c_fc.weight"].ratio == 0.5
    )


def test_a_state_says_its_rates_and_old_forms_stay():
    model = make("llama")
    plain = BlockwiseAdamMini(model.named_parameters(), block_map=map_blocks(model))
    assert plain.record().as_dict()["format"] == 2  # readable by earlier versions
    rules = [
        {"match": "*.layers.*", "layers": "first", "name": "low", "lr_ratio": 0.5},
        {"match": "*", "layer_decay": 0.5},
    ]
    own = BlockwiseAdamMini(model.named_parameters(), block_map=map_blocks(model, rules=rules))
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    own.step()
    assert own.record().as_dict()["format"] == 3
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = copy.deepcopy(own)
    again.load_state_dict(saved)
    assert again.block_lrs() == own.block_lrs() and again.own_blocks == {"low": 0.5}
    with pytest.raises(BlockError) as told:
        plain.load_state_dict(saved)
    assert "block_lr_ratios: by block_rules, " in str(told.value) and "embedding x 0.125 -> embedding" in str(
        told.value
    )
    assert "block_lr_ratios: low 0.5 -> unset" in str(told.value) and "accept_mismatch" in str(told.value)
    plain.accept_mismatch = ("block_lr_ratios",)
    plain.ratio_fade_steps = 4
    plain.load_state_dict(saved)
    assert "low" not in plain.block_lrs()[0]
    plain.step()


def test_codegens_groups_can_be_said():
    """[q, v, k] for each of four groups of heads, at six heads a group."""
    config = transformers.CodeGenConfig(vocab_size=50, n_embd=96, n_layer=1, n_head=24, rotary_dim=4, n_positions=16)
    model = transformers.CodeGenForCausalLM(config)
    name = "transformer.h.0.attn.qkv_proj.weight"
    table = map_blocks(model)[name]
    own = map_blocks(model, rules=[{"match": "*.qkv_proj.weight", "split": ["q", "v", "k"], "interleave": 4}])[name]
    assert own.repeat == 4 and own.pieces == table.pieces and [piece.size for piece in own.pieces] == [24] * 3


def test_minimaxs_heads_in_a_model_of_grouped_queries_can_be_said():
    """Lightning attention has as many key heads as query heads, whatever the other layers have."""
    model = llama()
    model.mixer = nn.Linear(32, 96, bias=False)
    rule = {"match": "mixer.weight", "split": ["q", "k", "v"], "interleave": "head"}
    with pytest.raises(BlockError, match="cannot be interleaved per head"):
        map_blocks(model, rules=[rule])
    mapped = map_blocks(model, rules=[{**rule, "kv_heads": 4}])["mixer.weight"]
    assert mapped.repeat == 4 and [(piece.role, piece.size, piece.unit) for piece in mapped.pieces] == [
        ("q", 8, 8),
        ("k", 8, 8),
        ("v", 8, 1),
    ]


def test_any_split_can_be_said_by_shares():
    """[q, k, v, ffn] in one weight, twice over: 4 heads of 8 of q, 2 of k and v, and 64 rows of a feed-forward network."""
    model = llama()
    model.mixer = nn.Linear(32, 128, bias=False)
    mapped = map_blocks(
        model,
        rules=[{"match": "mixer.weight", "split": {"q": 2, "k": 1, "v": 1, "ffn": 4}, "interleave": 2}],
    )["mixer.weight"]
    assert mapped.repeat == 2 and [(p.block.value, p.role, p.size, p.unit) for p in mapped.pieces] == [
        ("qk", "q", 16, 8),
        ("qk", "k", 8, 8),
        ("vo", "v", 8, 1),
        ("ffn", "ffn", 32, 1),
    ]
    with pytest.raises(BlockError, match="128 rows do not divide into 7 equal parts"):
        map_blocks(model, rules=[{"match": "mixer.weight", "split": {"q": 2, "ffn": 5}}])


@pytest.mark.parametrize(
    "rules, words",
    [
        ([{"match": "*", "lr_ratio": 0}], ["lr_ratio is 0", "above 0"]),
        ([{"match": "*", "lr_ratio": "0.1"}], ["lr_ratio is '0.1'", "without quotes"]),
        ([{"match": "*", "lr_scale": float("nan")}], ["lr_scale is nan"]),
        ([{"match": "*", "layer_decay": -1}], ["layer_decay is -1"]),
        ([{"match": "*", "lr_ratio": 1, "lr_scale": 1}], ["give one of both"]),
        ([{"match": "*", "name": "a", "lr_scale": 1}], ["give one of both"]),
        ([{"match": "*", "name": "qk"}], ["'qk' is a name that block_lr_ratios has already"]),
        ([{"match": "*", "name": "a b"}], ["'a b' cannot name a block"]),
        ([{"match": "*", "name": ""}], ["cannot name a block"]),
        ([{"match": "*", "layers": "middle", "lr_scale": 1}], ["'middle' names no layers", '"upper half"']),
        ([{"match": "*", "layers": "4-2", "lr_scale": 1}], ["'4-2' names no layers"]),
        ([{"match": "*", "layers": "first 0", "lr_scale": 1}], ["'first 0' names no layers"]),
        ([{"match": "*", "layers": 3, "lr_scale": 1}], ["layers is 3"]),
        ([{"match": "*", "layers": "first"}], ['or a rate: "lr_ratio"']),
        ([{"match": "*", "lr_scale": 1, "q_heads": 2}], ['"q_heads" says something of a layout']),
        ([{"match": "*", "split": ["q", "k"], "interleave": 0}], ["interleave is 0", "number of repeats"]),
        ([{"match": "*", "split": ["q", "k"], "interleave": True}], ["interleave is True"]),
        ([{"match": "*", "split": {"q": 1, "w": 1}}], ["unknown role 'w'", "ffn"]),
        ([{"match": "*", "split": {"q": 0}}], ["split is {'q': 0}"]),
        ([{"match": "*", "split": {"q": 1}, "interleave": "head"}], ["follows from head counts"]),
        ([{"match": "*", "block": "qk", "kv_heads": 0}], ["kv_heads is 0"]),
        (
            [{"match": "a", "name": "x", "lr_ratio": 1}, {"match": "b", "name": "x", "lr_ratio": 2}],
            ["give the block 'x' the lr_ratio 1 and 2"],
        ),
    ],
)
def test_bad_rules(rules, words):
    with pytest.raises(BlockError) as error:
        user_rules(rules)
    assert all(text in str(error.value) for text in words), error.value
    assert len(str(error.value)) < 600


def test_depth_in_a_model_without_layers():
    with pytest.raises(BlockError, match="has layer_decay, and no numbers in the parameters' names"):
        map_blocks(nn.ModuleDict({"ln": nn.LayerNorm(4)}), rules=[{"match": "*", "layer_decay": 0.5}])


def test_auto_ratios_are_of_block_types():
    model = make("llama")
    with pytest.raises(BlockError, match=r"blocks of your own \(mlp\), and AutoRatios measures block types"):
        AutoRatios(model, optimizer_of(model, [{"match": "*.mlp.*", "lr_ratio": 2}]), lambda: [], at={1})
