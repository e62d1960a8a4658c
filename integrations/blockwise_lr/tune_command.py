"""The command ``blockwise-lr tune``."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .blocks.presets import PRESETS
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
    ] = "paper",
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
    (out / "result.json").write_text(report.as_json(search, losses) + "\n")
    try:
        report.draw(search, losses, out / "loss.png")
    except ImportError:
        errors.print("no picture: it needs matplotlib")
    if as_json:
        typer.echo(report.as_json(search, losses))
        return
    out_console = console(120)
    out_console.print(report.table(search, losses))
    best = search.found(losses).best
    say(report.verdict(search, losses))
    if best is not None and search.has_other_ratios(losses):
        typer.echo(report.to_paste(search, best))


def _ratios(text: str) -> dict[str, float]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise BlockError(f"--start is {text}; use one of {', '.join(PRESETS)}, or JSON by block type") from None
