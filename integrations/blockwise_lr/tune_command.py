"""The command ``blockwise-lr tune``."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .blocks.presets import DEFAULT, PRESETS
from .blocks.types import BlockError
from .terminal import console, refuse, refuse_without, say
from .tuning.runs import LOSS, Command
from .tuning.search import Search, Setting, searched_blocks


def tune(
    command: Annotated[
        list[str],
        typer.Argument(
            help="After --: the command of one short run, with {lr}, {ratios} (JSON) or {ratio_words} (embedding=10 qk=8 ...), "
            "{seed}, {out} (a folder of its own), or {ds_config} in it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the search; started again, it goes on from there.")],
    lr: Annotated[
        float, typer.Option(help="Where AdamW's learning rates start: near its best, if you know it.")
    ] = 1e-3,
    start: Annotated[
        str, typer.Option(help=f"Ratios to start from: {', '.join(PRESETS)}, or JSON by block type.")
    ] = DEFAULT,
    blocks: Annotated[
        str, typer.Option(help="Block types whose ratios are searched.")
    ] = "embedding,head,qk,vo,ffn,norm",
    trials: Annotated[int, typer.Option(help="Runs at most; 7 or more.")] = 60,
    seeds: Annotated[int, typer.Option(help="Seeds in all, for AdamW's best and the best ratios.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
    margin: Annotated[float, typer.Option(help="Nats by which a ratio must improve the loss to be taken.")] = 0.0,
    loss: Annotated[str, typer.Option(help="Pattern of a printed loss, with the groups step and loss.")] = LOSS,
    last: Annotated[int, typer.Option(help="A run's loss is the mean of so many last ones.")] = 1,
    ds_config: Annotated[Path | None, typer.Option(help="Base of {ds_config}.")] = None,
    halving: Annotated[
        bool, typer.Option(help="Stop runs early by successive halving. Curves of different rates may cross late.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find AdamW's best rate, then the base rate and ratios for your own model. Exit code 2: bad input, or a failed run.

    Example: blockwise-lr tune --out runs/tune --lr 1e-3 -- python train.py --lr {lr} --ratios {ratios} --seed {seed}
    """
    errors = Console(stderr=True)
    try:
        given = Command.checked(command, loss, last, ds_config)
        search = Search(
            lr, searched_blocks(blocks.split(",")), start if start in PRESETS else _ratios(start), seeds, trials, margin
        )
        if seeds > 1 and not given.takes_seed:
            raise BlockError("the command has no {seed}, so runs cannot be repeated; write it in, or give --seeds 1")
        if jobs < 1:
            raise BlockError(f"--jobs is {jobs}; give at least 1")
        from .tuning import report
        from .tuning.study import Study

        study = Study(out, search, given, halving)
        begun, ended_before = time.monotonic(), len(study.losses())

        def told(setting: Setting, value: float, ended: int) -> None:
            ratios = " ".join(f"{name}={ratio:g}" for name, ratio in search.ratios(setting).items())
            left = (time.monotonic() - begun) / (ended - ended_before) * (trials - ended)
            errors.print(
                f"run {ended} of at most {trials}: loss {value:.4f} at lr {setting.lr:.3g} {ratios} seed {setting.seed}; "
                f"at most {timedelta(seconds=round(left))} left",
                soft_wrap=True,
                highlight=False,
            )

        losses = study.run(jobs, told)
    except ImportError as error:
        refuse_without("tune", "optuna", "tune", error)
    except (BlockError, OSError, ValueError) as error:
        refuse("tune", error)
    found = search.found(losses).best if search.has_other_ratios(losses) else None
    show_found(report, search, losses, found, out / "loss.png", as_json)


def show_found(report: Any, search: Any, runs: Any, found: Any, picture: Path, as_json: bool) -> None:
    """Writes what a search has found into its folder, and prints it.

    Args:
        report: the module that makes text and picture of a search and its runs.
        found: what is to be pasted; None where nothing was found.
        picture: its file; the JSON goes beside it.
    """
    text = report.as_json(search, runs)
    (picture.parent / "result.json").write_text(text + "\n")
    try:
        report.draw(search, runs, picture)
    except ImportError:
        Console(stderr=True).print("no picture: it needs matplotlib")
    if as_json:
        typer.echo(text)
        return
    console(120).print(report.table(search, runs))
    say(report.verdict(search, runs))
    if found is not None:
        typer.echo(report.to_paste(search, found))


def _ratios(text: str) -> dict[str, float]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise BlockError(f"--start is {text}; use one of {', '.join(PRESETS)}, or JSON by block type") from None
