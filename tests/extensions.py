"""DeepSpeed's communication op for the CPU and our C++ kernel, built before rank processes need them.

Every DeepSpeed start on the CPU loads the op, and the first one compiles it: a minute or more, for which a case's time
limit is not meant. A rank that is killed while it compiles leaves PyTorch's lock file behind, and every later load then
waits for ever; so the build runs here, once, in a process that is left to finish.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from references import FOLDER

_BUILD = """
import os, torch
from blockwise_lr.kernels import kernel_for
from deepspeed.comm.torch import build_shm_op

if child := os.fork():  # each has a compiler, which takes half a minute
    build_shm_op()
    os.waitpid(child, 0)
else:
    kernel_for(torch.device("cpu"))
    os._exit(0)
"""


@functools.cache
def build_once(limit: float = 900) -> None:
    """Builds what is not built yet, in $TORCH_EXTENSIONS_DIR, and clears the locks of builds that were killed.

    Args:
        limit: seconds the build may take.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    built = Path(os.environ[FOLDER]) / f"built-{hashlib.sha256(str(folder).encode()).hexdigest()}"
    with open(folder / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel when its holder dies, unlike PyTorch's
        if built.exists():  # by another worker of this session
            return
        for left in folder.glob("deepspeed_*/lock"):
            left.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", _BUILD], capture_output=True, text=True, timeout=limit)
        if done.returncode:
            raise RuntimeError(
                f"DeepSpeed's communication op could not be built (g++ is needed):\n{done.stderr[-3000:]}"
            )
        built.touch()
