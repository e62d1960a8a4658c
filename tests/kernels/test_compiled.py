"""The Triton kernel compiles for GPUs, also where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("which", [(), pytest.param(("--full",), marks=pytest.mark.full)], ids=["bf16", "all"])
def test_the_gpu_kernel_compiles_and_moves_four_elements_at_a_time(which, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiled.py")), *which],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, instructions in json.loads(done.stdout).items():
        wide = "v2" if "sums" in name and "*fp32" not in name else "v4"  # four elements at a time
        assert f"ld.global.{wide}.b32" in instructions, (name, instructions)
        assert "sums" in name or "st.global.v4.b32" in instructions, (name, instructions)
        rounding = any(instruction.startswith("cvt.rn.bf16") for instruction in instructions)  # the bfloat16 copy
        assert rounding == ("sums" not in name), (name, instructions)
