"""The demo: ``python examples/demo/run.py`` pre-trains a small GPT on two processes with three optimizers and compares.

AdamW and BlockwiseAdamW try three learning rates each at the demo's full length, and train a second time, from another
start on other text, at their best; BlockwiseAdamMini trains twice at BlockwiseAdamW's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from report import report

OUT = Path("runs/demo")
EXTENSIONS = Path(__file__).resolve().parents[2] / "build" / "torch_extensions" / str(sys.implementation.cache_tag)


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "DS_LOG_LEVEL": "error",
    }
    # not PyTorch's own folder, where a build that was killed has left a lock that DeepSpeed would wait for without end
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        str(Path(__file__).parent / "pretrain.py"),
        "--out",
        str(OUT),
        *sys.argv[1:],
    ]
    with (OUT / "log.txt").open("w") as log:
        code = subprocess.run(command, env=environment, stderr=log).returncode
    if code:
        print(f"the training processes failed; the end of {OUT / 'log.txt'}:")
        print("".join((OUT / "log.txt").read_text().splitlines(keepends=True)[-30:]))
        return code
    report(OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
