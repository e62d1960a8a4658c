"""The command ``blockwise-lr tune-seqlen``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .blocks.types import BlockError
from .terminal import refuse
from .tune_command import show_found
from .tuning import length_report as report
from .tuning.lengths import VALIDATION, LengthCommand, Lengths, LengthSearch, LengthStudy, Losses


def tune_seqlen(
    command: Annotated[
        list[str],
        typer.Argument(
            help="After --: the command of a run of two or three learning-rate warmups that validates at the full length "
            "several times, with {start} and {steps}, or {ds_config}, in it; {end} and {out} (a folder of its own) too."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the search; started again, it goes on from there.")],
    end: Annotated[int, typer.Option(help="The full length in tokens.")],
    steps: Annotated[int, typer.Option(help="Steps of the warmup at which the start is searched: few.")],
    most: Annotated[int, typer.Option(help="Steps of the warmup at most.")],
    first: Annotated[
        int, typer.Option(help="The smallest start; the paper's is 8, for billions of parameters 64.")
    ] = 8,
    fluctuation: Annotated[
        float, typer.Option(help="Perplexity over the best before it, above which a run is not calm.")
    ] = 1.3,
    precision: Annotated[float, typer.Option(help="The share by which the steps may be too few.")] = 0.125,
    loss: Annotated[str, typer.Option(help="Pattern of a printed validation loss, with the group loss.")] = VALIDATION,
    ds_config: Annotated[Path | None, typer.Option(help="Base of {ds_config}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find a sequence length warmup: the smallest start, then the most steps, whose first validations are calm.

    Example: blockwise-lr tune-seqlen --out runs/slw --end 1024 --steps 100 --most 3000 -- python train.py {start} {steps}
    Exit code 2: bad input, or a failed run.
    """
    errors = Console(stderr=True)
    try:
        search = LengthSearch(end, first, steps, most, fluctuation, precision)

        def told(lengths: Lengths, losses: Losses) -> None:
            calm = "calm" if search.is_calm(losses) else "not calm"
            errors.print(
                f"start {lengths.start}, {lengths.steps} steps: {calm} in {len(losses)} validations", highlight=False
            )

        runs = LengthStudy(out, search, LengthCommand.checked(command, loss, ds_config)).run(told)
    except (BlockError, OSError, ValueError) as error:
        refuse("tune-seqlen", error)
    show_found(report, search, runs, search.found(runs), out / "losses.png", as_json)
