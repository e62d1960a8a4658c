"""Megatron argument files: the names and shapes are those of Megatron's own GPTModel."""

import json
from pathlib import Path

import pytest
from ranks import pool
from typer.testing import CliRunner

from blockwise_lr.argument_file import megatron_model
from blockwise_lr.blocks import BlockError
from blockwise_lr.cli import app

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# the flags of the variants in megatron_door.layouts: 2 layers, width 32, 4 heads, vocabulary 64, length 12
COMMON = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --padded-vocab-size 64\n"
    "--max-position-embeddings 12 --transformer-impl local # norms of their own\n"
)
RMS = "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
FLAGS = {
    "gpt": "--untie-embeddings-and-output-weights",
    "gqa": RMS + "--swiglu --group-query-attention --num-query-groups 2 --qk-layernorm",
    "llama": RMS + "--swiglu --group-query-attention --num-query-groups 2",
    "moe": RMS + "--num-experts 4 --untie-embeddings-and-output-weights --moe-shared-expert-intermediate-size 24",
}


def real_shapes(variant):
    """Name -> shape of Megatron's own model; runs in a rank process."""
    from megatron_door.layouts import Layout, build_chunks, full_names, megatron

    with megatron(Layout()):
        return {name: tuple(p.shape) for name, p in full_names(build_chunks(variant, Layout()))}


@pytest.mark.parametrize("variant", FLAGS)
def test_names_and_shapes_are_those_of_the_real_model(variant, tmp_path):
    pytest.importorskip("megatron.core")
    (tmp_path / "model.args").write_text(COMMON + FLAGS[variant])
    found = {name: tuple(p.shape) for name, p in megatron_model(tmp_path / "model.args").named_parameters()}
    assert found == pool(1).run(real_shapes, variant)[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("megatron/*.args")), ids=lambda path: path.stem)
def test_ready_argument_files_have_the_blocks_of_the_same_hugging_face_model(path):
    """Element for element per block type, whatever the names and the fusion."""
    model = json.loads((CONFIGS / "models" / f"{path.stem}.json").read_text())
    options = ["--format", "json", "--vocabulary", str(model["vocab_size"])]
    found = [
        CliRunner().invoke(app, ["inspect", str(target), *options])
        for target in (path, CONFIGS / "models" / f"{path.stem}.json")
    ]
    assert [result.exit_code for result in found] == [0, 0], found[0].output
    ours, wanted = (json.loads(result.output)["totals"] for result in found)
    assert ours == wanted


def test_what_cannot_be_built_is_refused(tmp_path):
    file = tmp_path / "model.args"
    for text, words in (
        ("--num-layers 4", "required"),
        (COMMON + "--multi-latent-attention", "--multi-latent-attention"),
        (COMMON.replace("--padded-vocab-size 64", ""), "--vocabulary"),
    ):
        file.write_text(text)
        with pytest.raises(BlockError, match=words):
            megatron_model(file)
