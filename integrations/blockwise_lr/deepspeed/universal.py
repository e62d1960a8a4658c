"""``python -m blockwise_lr.deepspeed.universal CHECKPOINT OUTPUT``: from a checkpoint to a universal one.

Runs DeepSpeed's own converter (``ds_to_universal``) on a checked checkpoint and adds a manifest. Nothing of this package
imports this module, so that Python can run it.
"""

from __future__ import annotations

import argparse

from ..checkpoint.errors import CheckpointError
from .conversion import convert
from .universal_loading import UniversalFolder

__all__ = ["UniversalFolder", "convert"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m blockwise_lr.deepspeed.universal",
        description="Converts a checkpoint folder of a ZeRO engine into a universal one.",
    )
    parser.add_argument("checkpoint", help="folder of one tag, e.g. checkpoints/global_step1000")
    parser.add_argument("output", help="folder to write, e.g. checkpoints/global_step1000_universal")
    parser.add_argument("--workers", type=int, default=1, help="parallel processes")
    given = parser.parse_args()
    try:
        convert(given.checkpoint, given.output, workers=given.workers)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
