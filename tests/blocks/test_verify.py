"""blockwise-lr inspect --verify: the model's own forward pass against the map that inspect prints."""

import json

import transformers
from typer.testing import CliRunner

from blockwise_lr.cli import app
from blockwise_lr.verification import cut_config, verify


def saved(folder, config, architecture):
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


def llama(folder):
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=16, num_attention_heads=6, num_key_value_heads=2
    )
    return saved(folder, config, "LlamaForCausalLM")


def test_a_right_map_is_proven(tmp_path):
    found = verify(llama(tmp_path))
    assert (found.proven, found.contradicted) == (2 * 3, [])  # q, k, v of two layers
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--verify"])
    assert result.exit_code == 0 and "verified: 6 parameters" in result.output


def test_a_wrong_rule_ends_with_its_rows(tmp_path):
    target, rules = llama(tmp_path / "model"), tmp_path / "rules.json"
    rules.write_text(json.dumps([{"match": "*.v_proj.*", "block": "qk"}]))
    result = CliRunner().invoke(app, ["inspect", target, "--verify", "--rules", str(rules)])
    assert result.exit_code == 4
    assert "layers.1.self_attn.v_proj.weight, rows 0–31: mapped as qk, feeds the values" in result.output


ODD = """
import torch
from torch import nn

class Mixer(nn.Module):  # [q, v, k] for each of two groups of heads, under a name that no table has
    def __init__(self):
        super().__init__()
        self.everything = nn.Linear(24, 72)
        self.out_proj = nn.Linear(24, 24)

    def forward(self, x):
        groups = self.everything(x).unflatten(-1, (2, 3, 12))
        q, v, k = (groups[..., i, :].transpose(1, 2) for i in range(3))
        return x + self.out_proj((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 24)
        self.layers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x
"""


def test_a_fused_projection_called_ffn_is_contradicted(tmp_path, monkeypatch):
    """Also where its rows together feed both: each feeds one of the two alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_whole.py").write_text(ODD)
    rules = [{"match": "*.everything.*", "block": "ffn"}, {"match": "*.out_proj.*", "block": "vo"}]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    words = ["inspect", "odd_whole:Odd", "--verify", "--rules", "rules.json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 4, result.output
    assert "layers.0.everything.weight, rows 0–71: mapped as ffn, feeds the scores and the values" in result.output


def test_rules_for_what_is_unmapped_follow_from_what_it_feeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_model.py").write_text(ODD)
    result = CliRunner().invoke(app, ["inspect", "odd_model:Odd", "--verify"])
    said = [
        json.loads(line.partition("feeds: ")[2]) for line in result.output.splitlines() if "by what it feeds" in line
    ]
    assert result.exit_code == 3 and [rule["match"] for rule in said] == [
        f"layers.*.everything.{p}" for p in ("weight", "bias")
    ]
    assert said[0]["split"] == {"q": 1, "v": 1, "k": 1} and said[0]["interleave"] == 2
    (tmp_path / "rules.json").write_text(json.dumps([*said, {"match": "*.out_proj.*", "block": "vo"}]))
    result = CliRunner().invoke(app, ["inspect", "odd_model:Odd", "--verify", "--rules", "rules.json"])
    assert result.exit_code == 0 and "verified: 4 parameters" in result.output


def test_what_cannot_be_run_is_said(tmp_path):
    arguments = tmp_path / "model.args"
    arguments.write_text(
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 8 --position-embedding-type rope"
    )
    result = CliRunner().invoke(app, ["inspect", str(arguments), "--vocabulary", "64", "--verify"])
    assert result.exit_code == 2 and "--verify runs the model" in result.output


def test_encoders_and_pictures_run_too(tmp_path):
    vit = transformers.ViTConfig(hidden_size=36, num_attention_heads=3, num_hidden_layers=3, intermediate_size=40)
    assert verify(saved(tmp_path / "vit", vit, "ViTForImageClassification")).proven == 2 * 6  # with biases
    t5 = transformers.T5Config(d_model=36, num_heads=3, d_kv=12, d_ff=40, num_layers=3, num_decoder_layers=3)
    found = verify(saved(tmp_path / "t5", t5, "T5ForConditionalGeneration"))
    assert found.contradicted == [] and found.proven > 2 * 3 * 2


def test_a_config_is_cut_to_its_first_layer_of_full_attention():
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config = cut_config(transformers.Qwen3NextConfig(num_hidden_layers=12, layer_types=kinds * 3))
    assert (config.num_hidden_layers, config.layer_types) == (4, kinds)
