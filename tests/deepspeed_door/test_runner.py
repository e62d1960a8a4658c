"""``python -m blockwise_lr.deepspeed``: a script or module that knows nothing of this package finds its types."""

import json
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
