"""Every snippet of the README and of the configs' README is run, as far as one machine without a GPU can."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": ROOT / "README.md", "configs/README.md": ROOT / "configs" / "README.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def snippets(*kinds):
    found = [
        (page, number, text)
        for page, path in PAGES.items()
        for number, (kind, text) in enumerate(FENCE.findall(path.read_text()))
        if kind in kinds
    ]
    return [pytest.param(text, id=f"{page} {number}") for page, number, text in found]


def lines():
    fences = [fence for page in PAGES.values() for fence in FENCE.findall(page.read_text())]
    return [
        pytest.param(line, id=line[:60])
        for kind, text in fences
        if kind in ("", "bash", "sh")
        for line in text.splitlines()
        if line.strip()
    ]


@pytest.mark.parametrize("text", snippets("python"))
def test_python_runs(text, tmp_path):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", snippets("json"))
def test_json_is_a_ds_config(text):
    from deepspeed.runtime.config import DeepSpeedConfig
    from twins import llama

    from blockwise_lr.deepspeed.build import build_optimizer
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    parsed, model = DeepSpeedConfig(json.loads(text)), llama()
    optimizer = build_optimizer(parsed.optimizer_name, model, list(model.parameters()), parsed.optimizer_params)
    assert parsed.scheduler_name == "BlockwiseWarmupCosine"
    BlockwiseWarmupCosine(optimizer, **parsed.scheduler_params)


@pytest.mark.parametrize("line", lines())
def test_commands_exist(line, tmp_path, monkeypatch):
    """blockwise-lr is run; of other commands, the make target and the files they name exist."""
    from blockwise_lr.cli import app

    words = shlex.split(line.partition("#")[0].replace("$(cat ", "").replace(")", ""))
    if words[0] == "blockwise-lr":
        monkeypatch.chdir(ROOT)
        words = [str(tmp_path / word) if words[i - 1] == "--output" else word for i, word in enumerate(words)]
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    assert words[0] in ("deepspeed", "torchrun", "python", "pip", "sbatch", "git", "cd"), f"teach this test {words[0]}"
    for word in words:
        if word.startswith(("configs/", "examples/")):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_to_files_work(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
