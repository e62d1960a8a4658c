"""On a CUDA device, through NCCL: `make test-gpu` runs this and the kernels' tests; skipped where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def results():
    """What every case says, from one process that runs all of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("on_device.py"))],
        env={**environment, "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line[len("RESULT ") :]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_its_twin(results, case, record_property):
    said = results[case]
    assert "error" not in said, said["error"]
    if "different" in said:
        assert said["different"] == 0
        return
    record_property("worst", said["worst"])
    assert said["worst"] < 1e-5
