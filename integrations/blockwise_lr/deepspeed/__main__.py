"""``python -m blockwise_lr.deepspeed SCRIPT ARGS…``: runs a script that does not import this package, with our types in it."""

from __future__ import annotations

import os
import runpy
import sys

from ..blocks import BlockError
from ..collective import errors_in_a_sentence
from ..patches import PatchError

_USAGE = """usage: torchrun … -m blockwise_lr.deepspeed SCRIPT ARGS…
       torchrun … -m blockwise_lr.deepspeed -m MODULE ARGS…

Runs SCRIPT or MODULE as python does, once DeepSpeed knows the optimizer and scheduler types of blockwise_lr: for programs
that cannot be changed to import blockwise_lr.deepspeed themselves. Errors of blockwise_lr end it without a traceback."""


def main() -> None:
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if is_module else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if arguments else 2)
    sys.argv = arguments
    if not is_module and not os.path.isfile(arguments[0]):
        sys.exit(f"blockwise_lr.deepspeed: there is no script {arguments[0]!r}")
    with errors_in_a_sentence("blockwise_lr.deepspeed", BlockError, PatchError):
        if is_module:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # as python does
            runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
