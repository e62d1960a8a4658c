"""The command ``blockwise-lr plan``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from .blocks import BlockError, map_blocks
from .inspection import load_model
from .planning.fit import fit_optima
from .planning.laws import allocate
from .planning.recipe import PEAK, Memory, ds_config, megatron_args, recipe
from .planning.report import short, show
from .planning.size import Size, model_size
from .planning.state import largest_state_bytes
from .terminal import console, refuse, refuse_without

_DAY = 86400.0


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A Hugging Face config, a Megatron argument file or package.module:factory: what is to be trained."
        ),
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Floating-point operations of the run.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="Active parameters with the output layer, in place of a model.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the run.")] = None,
    gpus: Annotated[int | None, typer.Option(help="With --days: the budget in devices and time.")] = None,
    days: Annotated[float | None, typer.Option(help="Days of training.")] = None,
    gpu: Annotated[
        str, typer.Option(help=f"{', '.join(PEAK)}, or the peak of one device in TFLOP/s (dense, 16 bits).")
    ] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of the peak that the run reaches.")] = 0.4,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    batch: Annotated[int | None, typer.Option(help="Tokens of a batch; the law's otherwise.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Data-parallel ranks; --gpus otherwise, or 1.")] = None,
    zero: Annotated[int, typer.Option(help="ZeRO stage.")] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw, adam_mini or lion, for the memory.")] = "adamw",
    sequences: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activations are recomputed, layer by layer.")
    ] = False,
    vocabulary: Annotated[int | None, typer.Option(help="Rows of the embedding, for an argument file.")] = None,
    length_start: Annotated[
        int | None,
        typer.Option("--length-warmup-start", help="First length of a sequence length warmup, linear to --length."),
    ] = None,
    length_steps: Annotated[int | None, typer.Option("--length-warmup-steps", help="Steps of it.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="CSV of your own runs (flops,parameters,loss): the size law is fitted on these as well."),
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Folder for a ds_config.json and Megatron's flags.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Size, tokens, batch, learning rate, steps and memory of a run, from any two of compute, size and tokens.

    Example: blockwise-lr plan config.json --gpus 64 --days 7 --ranks 64 --zero 1. Exit code 2: bad input.
    """
    try:
        counted = None if model is None else _counted(model, vocabulary, parameters)
        compute, rate = _compute(flops, gpus, days, gpu, mfu)
        found = counted[1] if counted else None
        budget = allocate(compute, found.active if found else parameters, tokens)
        shared = ranks or gpus or 1
        memory = None
        if counted is not None:
            kept = _activations(counted[0], sequences, length, checkpointing)
            memory = _memory(counted[0], zero, shared, optimizer, kept)
        if (length_start is None) != (length_steps is None):
            raise BlockError("--length-warmup-start and --length-warmup-steps go together; give both")
        grows = None if length_start is None or length_steps is None else (length_start, length_steps)
        made = recipe(
            budget,
            body=found.body if found else None,
            length=length,
            batch=batch,
            ranks=shared,
            size=found,
            memory=memory,
            length_warmup=grows,
        )
        fitted = None if runs is None else fit_optima(_read_runs(runs))
        if write is not None:
            config = ds_config(made, micro_batch=sequences, stage=zero, optimizer=optimizer)
            flags = megatron_args(made, micro_batch=sequences, optimizer=optimizer)
            write.mkdir(parents=True, exist_ok=True)
            (write / "ds_config.json").write_text(config + "\n")
            (write / "megatron.args").write_text(flags)
    except ImportError as error:
        refuse_without("plan", "SciPy", "plan", error)
    except (BlockError, OSError, ValueError) as error:
        refuse("plan", error)
    if as_json:
        own = None if fitted is None else {"coefficient": fitted.coefficient, "exponent": fitted.exponent}
        typer.echo(json.dumps({**made.as_dict(), "law_of_your_runs": own}, indent=1))
        return
    out = console(100)
    time = None if rate is None else f"{made.flops / (rate * _DAY):.3g} days at {rate:.3g} FLOP/s"
    show(made, out, time)
    if fitted is not None:
        out.print(
            f"Compute-optimal by your own runs: {short(fitted.parameters(budget.flops))} ({len(fitted.optima)} budgets, "
            f"exponent {fitted.exponent:.3f}; the law's is 0.497).",
            soft_wrap=True,
        )
    if write is not None:
        out.print(f"written: {write / 'ds_config.json'} and {write / 'megatron.args'}", soft_wrap=True)


def _counted(target: str, vocabulary: int | None, parameters: float | None) -> tuple[torch.nn.Module, Size]:
    if parameters is not None:
        raise BlockError(f"--parameters is {parameters:g} and the model {target} says its own; give one of them")
    model = load_model(target, vocabulary)
    return model, model_size(model)


def _compute(
    flops: float | None, gpus: int | None, days: float | None, gpu: str, mfu: float
) -> tuple[float | None, float | None]:
    """Floating-point operations of the run, and per second."""
    peak = PEAK.get(gpu.lower())
    if peak is None:
        try:
            peak = float(gpu)
        except ValueError:
            raise BlockError(f"--gpu is {gpu!r}; use one of {', '.join(PEAK)}, or TFLOP/s as a number") from None
    if not 0 < mfu <= 1:
        raise BlockError(f"--mfu is {mfu}; give a share above 0, up to 1")
    rate = None if gpus is None else gpus * peak * 1e12 * mfu
    if days is None:
        return flops, rate
    if rate is None:
        raise BlockError("--days needs --gpus, whose time it is")
    if flops is not None:
        raise BlockError("--flops and --days both say the compute; give one of them")
    return days * _DAY * rate, rate


def _activations(model: torch.nn.Module, sequences: int, length: int, checkpointing: bool) -> int | None:
    """None for a model that is no transformers one, or does not run without contents."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    from .transformers.activations import activation_bytes

    try:
        return activation_bytes(config, sequences, length, checkpointing=checkpointing)
    except BlockError:
        return None


def _memory(model: torch.nn.Module, stage: int, ranks: int, optimizer: str, activations: int | None) -> Memory:
    block_map = map_blocks(model, family=getattr(model, "blockwise_family", None))
    states = largest_state_bytes(block_map, stage=stage, ranks=ranks, optimizer=optimizer)
    with_adamw = largest_state_bytes(block_map, stage=stage, ranks=ranks)
    return Memory(stage, ranks, optimizer, states, with_adamw, activations)


def _read_runs(file: Path) -> list[tuple[float, float, float]]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        return [(float(row["flops"]), float(row["parameters"]), float(row["loss"])) for row in rows]
    except (KeyError, ValueError, TypeError) as error:
        raise BlockError(f"{file} has a row without the numbers flops, parameters and loss ({error})") from None
