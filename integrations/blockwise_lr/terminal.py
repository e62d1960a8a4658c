"""What the commands share: exit codes, the console, and how bad input ends."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.status import Status

EXIT_BAD_INPUT, EXIT_UNMAPPED, EXIT_CONTRADICTED = 2, 3, 4


def console(width: int = 200) -> Console:
    """Standard output; so wide where it is no terminal, so that nothing is cut in a file or a pipe."""
    found = Console()
    return found if found.is_terminal else Console(width=width)


def busy(what: str) -> Status:
    """A line on the standard error while something takes its time; none where that is no terminal."""
    return Console(stderr=True).status(what)


def say(text: str) -> None:
    """Prints prose: wrapped at words on a terminal, in one line where it is none."""
    out = Console()
    out.print(text, soft_wrap=not out.is_terminal, highlight=False, markup=False)


def refuse(command: str, error: object) -> NoReturn:
    """Ends a command with one sentence.

    Raises:
        typer.Exit: always, with the exit code of bad input.
    """
    typer.echo(f"blockwise-lr {command}: {error}", err=True)
    raise typer.Exit(EXIT_BAD_INPUT) from None


def refuse_without(command: str, package: str, extra: str, error: ImportError) -> NoReturn:
    """Ends a command that lacks a package of one of the extras."""
    typer.echo(f"blockwise-lr {command} needs {package}; install blockwise-lr[{extra}] ({error})", err=True)
    raise typer.Exit(EXIT_BAD_INPUT) from None
