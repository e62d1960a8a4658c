"""blockwise-lr on the command line."""

import json
import time

import pytest
from typer.testing import CliRunner

from blockwise_lr.cli import app
from blockwise_lr.inspection import Row, folded

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def unknown_model():
    import torch

    return torch.nn.ModuleDict({"mystery": torch.nn.Linear(2, 3), "wte": torch.nn.Embedding(5, 2)})


def test_inspect_reads_a_hugging_face_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    result = run("inspect", tmp_path, "--lr", "3e-4", "--ratio", "qk=4", "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    rows = {row["parameter"]: row for row in found["parameters"]}
    assert rows["model.layers.1.self_attn.q_proj.weight"] == {
        "parameter": "model.layers.1.self_attn.q_proj.weight",
        "shape": [64, 64],
        "where": "all",
        "block": "qk",
        "ratio": 4.0,
        "peak_lr": pytest.approx(1.2e-3),
        "weight_decay": 0.1,
        "numel": 4096,
    }
    assert found["totals"]["qk"] == 2 * (64 * 64 + 32 * 64)
    table = run("inspect", tmp_path)
    assert "model.layers.{0-1}.post_attention_layernorm.weight" in table.output and "totals" in table.output
    every = run("inspect", tmp_path, "--all")
    assert "model.layers.0.post_attention_layernorm.weight" in every.output
    assert len(every.output.splitlines()) - len(table.output.splitlines()) == 9  # parameters of a layer


def test_rows_of_repeated_layers_and_experts_are_one():
    def row(name, shape=(2, 3), block="ffn"):
        return Row(name, shape, "all", block, 6.0, 6e-3, 0.1, 6)

    rows = [row(f"h.{layer}.experts.{expert}.w") for layer in (0, 1, 2) for expert in (0, 1)]
    rows += [row("h.0.norm", (3,), "norm"), row("h.2.norm", (3,), "norm"), row("head.w")]
    rows += [row(f"{number}.odd", (5, 5)) for number in (0, 2, 4, 6, 8)]
    found = {one.parameter: (one.numel, count) for one, count in folded(rows)}
    assert found == {
        "h.{0-2}.experts.{0-1}.w": (36, 6),
        "h.{0,2}.norm": (12, 2),
        "head.w": (6, 1),
        "{0,2,4,...8}.odd": (30, 5),
    }


def test_inspect_shows_ranges_of_a_fused_weight():
    result = run("inspect", "twins:gpt2", "--format", "json")
    found = [
        row
        for row in json.loads(result.output)["parameters"]
        if row["parameter"] == "transformer.h.0.attn.c_attn.weight"
    ]
    assert [(row["where"], row["block"]) for row in found] == [("columns 0–47", "qk"), ("columns 48–71", "vo")]


def test_inspect_exits_with_3_when_something_is_unmapped(tmp_path):
    result = run("inspect", "shell.test_commands:unknown_model")
    assert result.exit_code == 3 and "UNMAPPED" in result.output
    rules = tmp_path / "rules.json"
    rules.write_text('[{"match": "*.mystery.*", "block": "ffn"}]')
    assert run("inspect", "shell.test_commands:unknown_model", "--rules", rules).exit_code == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "no file, no folder"),
        (["twins:gone"], "cannot find"),
        (["twins:gpt2", "--ratio", "mlp=3"], "unknown block type 'mlp'"),
        (["twins:gpt2", "--ratio", "ffn=-3"], "above 0"),
    ],
)
def test_bad_input_exits_with_2_and_says_why(arguments, words):
    result = run("inspect", *arguments)
    assert result.exit_code == 2 and words in result.output


def test_doctor_names_versions_patches_and_kernels():
    import torch

    result = run("doctor")
    assert result.exit_code == 0
    for words in (torch.__version__, "reference", "no problems", "doctor --patches"):
        assert words in result.output
    assert len(result.output.splitlines()) < 40 and "deepspeed-types" not in result.output
    listed = run("doctor", "--patches").output
    assert "deepspeed-types" in listed and "DeepSpeedEngine._configure_basic_optimizer" in listed


def test_doctor_finds_the_lock_of_a_build_that_was_killed(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("old", 3600), ("new", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age,) * 2)
    said = run("doctor").output.replace("\n", "")
    assert "old/lock" in said and "a build that was killed has left it" in said and "remove it" in said
    assert "new/lock" not in said and "no problems" not in said


def test_doctor_says_first_what_is_wrong(monkeypatch):
    import importlib.metadata

    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0" if name == "deepspeed" else known(name))
    first = run("doctor").output.splitlines()[0]
    assert "deepspeed 0.1.0 not supported" in first


def test_a_picture_shows_every_block_type_with_its_learning_rate(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for kind in ("svg", "png"):
        result = run("inspect", tmp_path, "--format", kind, "--output", tmp_path / f"model.{kind}")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "model.svg").read_text()
    for words in ("embedding: lr 0.01", "norm: lr 0.001", "model.layers.1", "lm_head"):
        assert words in drawn  # matplotlib writes texts as comments beside their outlines
    assert run("inspect", tmp_path, "--format", "svg").exit_code == 2


def test_the_table_and_json_can_go_to_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert run("inspect", tmp_path, "--output", tmp_path / "t.txt").output == ""
    assert "model.layers.{0-1}.self_attn.q_proj.weight" in (tmp_path / "t.txt").read_text()
    run("inspect", tmp_path, "--format", "json", "--output", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["totals"]["ffn"] == 2 * 3 * 64 * 96


def test_a_model_of_400_billion_parameters_takes_seconds(tmp_path):
    """Llama 3.1 405B, all 126 layers."""
    import time

    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 16384,
                "intermediate_size": 53248,
                "num_hidden_layers": 126,
                "num_attention_heads": 128,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
            }
        )
    )
    start = time.process_time()
    result = run("inspect", tmp_path, "--format", "json")
    assert sum(json.loads(result.output)["totals"].values()) == pytest.approx(405.9e9, rel=0.001)
    assert time.process_time() - start < 30


def test_schedule_prints_every_block_type_and_draws(tmp_path):
    result = run(
        "schedule", "BlockwiseWSD", "total_num_steps=30", "warmup_num_steps=2", "meet_lr=lr", "--json", "--rows", 30
    )
    assert result.exit_code == 0, result.output
    rates = json.loads(result.output)["rates"]
    assert len(rates) == 30 and rates["10"]["embedding"] == pytest.approx(1e-2)
    assert set(rates["20"].values()) == {1e-3} and [*rates["30"].values()] == pytest.approx([1e-4] * 6)
    table = run("schedule", "configs/deepspeed/llama-0.25b.zero1.json", "--rows", 3)
    assert "BlockwiseWarmupCosine, lr 0.0006, min_lr 3e-05" in table.output and "50,000" in table.output
    assert (
        run(
            "schedule", "BlockwiseInfinite", "cooldown_num_steps=9", "constant_factor=0.5", "--plot", tmp_path / "a.svg"
        ).exit_code
        == 0
    )
    assert (tmp_path / "a.svg").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["Cosine"], "use one of BlockwiseWarmupCosine"),
        (["BlockwiseWSD"], "write total_num_steps=..."),
        (["BlockwiseWSD", "total_num_steps=30", "decay=3"], "unknown parameter 'decay'"),
        (["BlockwiseWSD", "total_num_steps=30", "--ratio", "kv=3"], "unknown block type 'kv'"),
        (["BlockwiseWSD", "total_num_steps=30", "--plot", "a.txt"], "FILE.svg or FILE.png"),
        (["missing.json"], "No such file"),
    ],
)
def test_bad_schedules_are_refused(arguments, words):
    result = run("schedule", *arguments)
    assert result.exit_code == 2 and words in result.output
