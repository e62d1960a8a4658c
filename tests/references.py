"""References that are computed once a session, whatever the number of ranks and cases that compare with them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = "BLOCKWISE_LR_TEST_REFERENCES"  # the environment variable that names the session's folder, set in conftest.py


def once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a module-level function returns in a file of the session, by its arguments.

    The first process that asks computes it while the others wait for the file. So ``compute`` may not enter a collective
    that these others take part in.
    """

    signature = inspect.signature(compute)

    @functools.wraps(compute)
    def kept(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        key = repr((compute.__module__, compute.__qualname__, bound.arguments))
        path = Path(os.environ[FOLDER]) / hashlib.sha256(key.encode()).hexdigest()
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel when its holder dies
            if not path.exists():
                torch.save(compute(*arguments, **options), f"{path}.new")
                os.replace(f"{path}.new", path)
        return torch.load(path, weights_only=False)

    return kept
