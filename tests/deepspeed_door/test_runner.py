"""``python -m blockwise_lr.deepspeed``: a script or module that knows nothing of this package finds its types."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from deepspeed.runtime.engine import DeepSpeedEngine
import beside

engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
known = [engine._is_supported_optimizer(name) for name in ("BlockwiseAdamW", "BlockwiseAdamMini", "BlockwiseNothing")]
json.dump([__name__, sys.argv, known, beside.NAME], open("found.json", "w"))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "train_it.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("beside", None)


@pytest.mark.parametrize("arguments", [["train_it.py"], ["-m", "train_it"]])
def test_a_script_that_imports_nothing_of_ours_finds_the_types(folder, arguments, monkeypatch):
    from blockwise_lr.deepspeed.__main__ import main

    if arguments[0] == "-m":  # python -m has the working folder on its path
        sys.path.insert(0, str(folder))
    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments, "--steps", "3"])
    main()
    name, argv, known, beside = json.loads((folder / "found.json").read_text())
    assert (name, argv[1:], beside) == ("__main__", ["--steps", "3"], "beside") and argv[0].endswith("train_it.py")
    assert known == [True, True, False]


WRONG = """
import torch
from blockwise_lr import BlockwiseAdamW

def build():
    return BlockwiseAdamW(torch.nn.Linear(2, 2).parameters())

build()
"""


@pytest.mark.parametrize("arguments", [["wrong.py"], ["-m", "wrong"]])
def test_under_torchrun_an_error_of_ours_is_a_line_of_each_rank(folder, arguments):
    (folder / "wrong.py").write_text(WRONG)
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "blockwise_lr.deepspeed"]
    done = subprocess.run(
        [sys.executable, "-m", *words, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    said = [line for line in done.stderr.splitlines() if "which parameter is which" in line]
    ended = [line for line in said if line.endswith("wrong.py, line 8)")]
    assert done.returncode and len(ended) == len(said) and 1 <= len(said) <= 2  # torchrun ends the other
    assert all(line.startswith("blockwise_lr.deepspeed, rank ") for line in said)
    assert 'wrong.py", line' not in done.stderr  # what is left of tracebacks is torchrun's own


@pytest.mark.parametrize(
    "arguments, code, said",
    [([], 2, "usage: torchrun"), (["--help"], 0, "-m MODULE"), (["gone.py"], None, "there is no script 'gone.py'")],
)
def test_what_cannot_be_run_is_told(folder, arguments, code, said, monkeypatch, capsys):
    from blockwise_lr.deepspeed.__main__ import main

    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert said in capsys.readouterr().out + str(stopped.value.code)
    assert code is None or stopped.value.code == code
