"""The command ``blockwise-lr report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ._version import __version__
from .blocks import BlockError
from .terminal import busy, console, refuse, refuse_without


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Files and folders: TensorBoard events, CSV, logs of Megatron or DeepSpeed, trainer_state.json, rows of our "
            "demo and evidence. LABEL=RUN names one; runs of one label are seeds of one arm, and so are names that differ in "
            "seed3 alone.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown to write too; its pictures go into a folder beside.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The run that others are compared with; the first otherwise.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare runs on one page: losses, steps and time to equal loss, rates and figures per block type, memory, what ran.

    Example: blockwise-lr report adamw=runs/a blockwise=runs/b --output report.html. Exit code 2: bad input.
    """
    from . import reporting
    from .reporting.find import with_short_names

    try:
        if output.suffix not in (".html", ".htm"):
            raise BlockError(f"--output is {output}; name a file that ends with .html")
        with busy("reading") as status:
            found = [
                run for word in runs for run in reporting.find_runs(word, lambda file: status.update(f"reading {file}"))
            ]
            with_short_names(found)
            made = reporting.report_of(found, base)
            status.update("drawing")
            heading = title or "; ".join(arm.name for arm in made.arms[:3]) + ("; ..." if len(made.arms) > 3 else "")
            by = f"Written by blockwise-lr {__version__} report."
            page = reporting.as_html(made, heading, by)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(page)
            if markdown is not None:
                markdown.parent.mkdir(parents=True, exist_ok=True)
                pictures = markdown.with_name(markdown.stem + "-pictures")
                markdown.write_text(reporting.as_markdown(made, heading, by, pictures))
    except ImportError as error:
        refuse_without("report", f"{error.name or 'a package'}", "report", error)
    except (BlockError, OSError, ValueError) as error:
        refuse("report", error)
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=1))
        return
    out = console(140)
    for table in made.tables():
        shown = Table(*table.head[:1], title=table.title)
        for column in table.head[1:]:
            shown.add_column(column, justify="right")
        for row in table.rows:
            shown.add_row(*row)
        out.print(shown)
    for note in made.notes:
        out.print(note, soft_wrap=True)
    out.print(f"written: {output}" + (f" and {markdown}" if markdown else ""), soft_wrap=True)
