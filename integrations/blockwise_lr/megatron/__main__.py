"""``python -m blockwise_lr.megatron [--on-cpu] SCRIPT ARGS…``: runs a Megatron script with blockwise optimizers in it."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import version

from ..blocks import BlockError
from ..collective import errors_in_a_sentence
from ..patches import PatchError

_USAGE = """usage: torchrun … -m blockwise_lr.megatron [--on-cpu] SCRIPT ARGS…

Runs SCRIPT, for example Megatron-LM's own pretrain_gpt.py, with {optimizers} as values of
--optimizer, and flags of ours such as --block-lr-ratios in Megatron's parser; the end of SCRIPT --help lists them.
--on-cpu trains on gloo without a GPU (add --distributed-backend gloo). Errors of blockwise_lr end it without a traceback."""


def main() -> None:
    arguments = sys.argv[1:]
    on_cpu = arguments[:1] == ["--on-cpu"]
    arguments = arguments[1:] if on_cpu else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        from .settings import KINDS

        print(_USAGE.replace("{optimizers}", ", ".join(KINDS)))
        sys.exit(0 if arguments else 2)
    if not os.path.isfile(arguments[0]):
        sys.exit(f"blockwise_lr.megatron: there is no script {arguments[0]!r}")
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # as python does; a checkout's megatron counts
    if on_cpu:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if os.environ.setdefault("TORCHDYNAMO_DISABLE", "1") == "1":
            import torch

            torch.compiler.set_stance("force_eager")  # importing this package has already decorated functions
        from ..patches.megatron_on_cpu import PATCH

        PATCH.apply()
    with errors_in_a_sentence("blockwise_lr.megatron", BlockError, PatchError):
        from .door import apply_patches
        from .preemption import requeued_when_asked

        apply_patches()
        try:
            with requeued_when_asked(arguments):
                runpy.run_path(arguments[0], run_name="__main__")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "megatron":
                raise
            raise BlockError(
                f"{arguments[0]} needs {error.name}, which megatron-core {version('megatron-core')} does not bring; its "
                f"training loop comes with 0.17 and newer, on Python 3.12 and newer, or from a clone of "
                f"Megatron-LM on PYTHONPATH"
            ) from error


if __name__ == "__main__":
    main()
