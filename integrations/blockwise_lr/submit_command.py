"""The commands ``blockwise-lr submit`` and ``blockwise-lr jobs``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .blocks import BlockError
from .jobs import CLUSTERS, Cluster, Job, Records, Sent, read_site
from .rules.options import did_you_mean
from .terminal import console, refuse

_RECORDS = Path("runs") / "jobs.jsonl"
_RECORDS_OPTION = typer.Option("--records", help="File of the jobs that were sent from here.")


def submit(
    command: Annotated[list[str], typer.Argument(help="Your training script and its arguments, behind --.")],
    cluster: Annotated[str, typer.Option(help=f"{', '.join(CLUSTERS)}.")] = "slurm",
    nodes: Annotated[int | None, typer.Option(help="Nodes; 1 by default.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus-per-node", help="GPUs of a node; 8 by default.")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes-per-node", help="Ranks of a node, where they are not its GPUs.")
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus-per-node", help="CPUs of a node.")] = None,
    duration: Annotated[str | None, typer.Option("--time", help="Longest time, as in 24:00:00.")] = None,
    name: Annotated[str, typer.Option(help="Of the job.")] = "blockwise",
    array: Annotated[str | None, typer.Option(help="Numbers of an array job, as in 0-3.")] = None,
    container: Annotated[str | None, typer.Option(help="Image, for Kubernetes and for Slurm with pyxis.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="A variable of the environment, as in --env KEY=VALUE.")] = None,
    venv: Annotated[
        str | None, typer.Option(help='Virtual environment on the nodes, this one by default; "" for none.')
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="A further word for sbatch, qsub or kubectl, as in --option=--partition=a100."),
    ] = None,
    site: Annotated[Path | None, typer.Option(help="TOML file with your site's defaults, a table per cluster.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    records: Annotated[Path, _RECORDS_OPTION] = _RECORDS,
) -> None:
    """Send a job that starts your script by torchrun on every node.

    Example: blockwise-lr submit --nodes 4 --time 24:00:00 -- train.py --deepspeed_config ds.json. Exit code 2: bad input.
    """
    try:
        to = _cluster(cluster)
        given = {
            "nodes": nodes,
            "gpus": gpus,
            "processes": processes,
            "cpus": cpus,
            "time": duration,
            "container": container,
            "venv": venv,
        }
        job = _job(command, name, array, given, env or [], option or [], read_site(site, cluster))
        if dry_run:
            typer.echo(to.shown(job))
            return
        number, log = to.send(job)
        Records(records).add(Sent(number, to.name, job.name, log, list(command), time.strftime("%Y-%m-%d %H:%M:%S")))
    except (BlockError, OSError) as error:
        refuse("submit", error)
    typer.echo(f"sent: {number}" + (f", log {log}" if log else "") + f"; blockwise-lr jobs --log {number} shows it")


def jobs(
    log: Annotated[str | None, typer.Option("--log", metavar="NUMBER", help="Print what a job has printed.")] = None,
    cancel: Annotated[str | None, typer.Option(metavar="NUMBER", help="End a job.")] = None,
    records: Annotated[Path, _RECORDS_OPTION] = _RECORDS,
) -> None:
    """List the jobs that were sent from here, with their states; show one's log, or end it.

    Example: blockwise-lr jobs --log 1234. Exit code 2: bad input.
    """
    kept = Records(records)
    try:
        if log is not None:
            sent = kept.find(log)
            typer.echo(_cluster(sent.cluster).log(sent.number, sent.log), nl=False)
        elif cancel is not None:
            _cluster(kept.find(cancel).cluster).cancel(cancel)
        else:
            _list(kept.all())
    except (BlockError, OSError) as error:
        refuse("jobs", error)


def _cluster(name: str) -> Cluster:
    if name not in CLUSTERS:
        raise BlockError(f"--cluster is {name!r}{did_you_mean(name, CLUSTERS)}; use one of {', '.join(CLUSTERS)}")
    return CLUSTERS[name]()


def _job(
    command: list[str],
    name: str,
    array: str | None,
    given: dict[str, Any],
    env: list[str],
    options: list[str],
    site: dict[str, Any],
) -> Job:
    """The job; what the command line does not say, the site does."""
    variables = dict(site.get("env", {}))
    for pair in env:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BlockError(f"--env is {pair!r}; write KEY=VALUE")
        variables[key] = value
    said = {**site, **{key: value for key, value in given.items() if value is not None}}
    if said.get("container") is None and sys.prefix != sys.base_prefix:  # else this environment would not be the job's
        said.setdefault("venv", sys.prefix)
    said.update(env=variables, options=[*site.get("options", ()), *options])
    return Job(command, name=name, array=array, **said)


def _list(every: list[Sent]) -> None:
    if not every:
        typer.echo("no jobs were sent from here")
        return
    table = Table("number", "state", "cluster", "name", "sent", "command")
    for sent in every:
        try:
            state = _cluster(sent.cluster).state(sent.number)
        except BlockError as error:  # a cluster forgets jobs after a while
            state = f"unknown ({error})"
        table.add_row(sent.number, state, sent.cluster, sent.name, sent.sent, " ".join(sent.command))
    console(120).print(table)
