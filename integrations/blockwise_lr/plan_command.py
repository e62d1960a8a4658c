"""The command ``blockwise-lr plan``."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from .blocks import BlockError, map_blocks
from .inspection import load_model
from .planning.compare import compare, differences, table
from .planning.fit import PowerLaw, fit_optima
from .planning.laws import allocate
from .planning.megatron_layout import MegatronLayout, flags_of
from .planning.megatron_state import MegatronStates
from .planning.recipe import PEAK, Memory, Recipe, ds_config, megatron_args, recipe
from .planning.report import short, show
from .planning.size import Size, model_size
from .planning.state import largest_state_bytes, peak_bytes
from .terminal import busy, console, refuse, refuse_without

if TYPE_CHECKING:
    from .transformers.activations import PassPeak

_DAY = 86400.0


# what a second plan's option takes the place of
_IN_PLACE_OF = {
    "flops": ("tokens", "days"),
    "days": ("tokens", "flops"),
    "tokens": ("flops", "days"),
    "parameters": ("model",),
    "model": ("parameters",),
}


def plan(
    context: typer.Context,
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
    ranks: Annotated[
        int | None, typer.Option(help="Data-parallel ranks; --gpus otherwise (over Megatron's TP and PP), or 1.")
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(help="ZeRO stage; 1 where the model is no Megatron argument file, which has its own layout."),
    ] = None,
    tensor: Annotated[
        int | None, typer.Option("--tensor-parallel", help="Megatron's; the argument file's otherwise.")
    ] = None,
    pipeline: Annotated[int | None, typer.Option("--pipeline-parallel", help="The same for pipeline stages.")] = None,
    expert: Annotated[int | None, typer.Option("--expert-parallel", help="The same for experts.")] = None,
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
    against: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="A second plan beside this one: its options where they are others, in quotes, or a file of --json.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Size, tokens, batch, learning rate, steps and memory of a run, from any two of compute, size and tokens.

    Example: blockwise-lr plan config.json --gpus 64 --days 7 --ranks 64 --zero 1. Exit code 2: bad input.
    """
    options = {name: value for name, value in context.params.items() if name not in ("against", "as_json", "write")}
    try:
        made = _planned(**options)
        other = None if against is None else _other(context, options, against)
        if write is not None:
            config = ds_config(
                made.recipe, micro_batch=sequences, stage=1 if zero is None else zero, optimizer=optimizer
            )
            flags = megatron_args(made.recipe, micro_batch=sequences, optimizer=optimizer)
            write.mkdir(parents=True, exist_ok=True)
            (write / "ds_config.json").write_text(config + "\n")
            (write / "megatron.args").write_text(flags)
    except ImportError as error:
        refuse_without("plan", "SciPy", "plan", error)
    except (BlockError, OSError, ValueError) as error:
        refuse("plan", error)
    if other is not None:
        mine = made.as_dict()
        if as_json:
            found = {"plans": [mine, other], "differences": differences(mine, other)}
            typer.echo(json.dumps(found, indent=1))
        else:
            console(100).print(table(compare(mine, other), ("this plan", str(against))))
        return
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=1))
        return
    out = console(100)
    show(made.recipe, out, made.time)
    if made.law is not None:
        out.print(
            f"Compute-optimal by your own runs: {short(made.law.parameters(made.recipe.budget.flops))} "
            f"({len(made.law.optima)} budgets, exponent {made.law.exponent:.3f}; the law's is 0.497).",
            soft_wrap=True,
        )
    if write is not None:
        out.print(f"written: {write / 'ds_config.json'} and {write / 'megatron.args'}", soft_wrap=True)


@dataclass(frozen=True)
class _Planned:
    """A recipe, floating-point operations per second of the devices, and the law of the user's runs."""

    recipe: Recipe
    rate: float | None
    law: PowerLaw | None

    @property
    def days(self) -> float | None:
        return None if self.rate is None else self.recipe.flops / (self.rate * _DAY)

    @property
    def time(self) -> str | None:
        return None if self.rate is None else f"{self.days:.3g} days at {self.rate:.3g} FLOP/s"

    def as_dict(self) -> dict[str, Any]:
        own = None if self.law is None else {"coefficient": self.law.coefficient, "exponent": self.law.exponent}
        return {**self.recipe.as_dict(), "days": self.days, "law_of_your_runs": own}


def _planned(
    model: str | None,
    flops: float | None,
    parameters: float | None,
    tokens: float | None,
    gpus: int | None,
    days: float | None,
    gpu: str,
    mfu: float,
    length: int,
    batch: int | None,
    ranks: int | None,
    zero: int | None,
    tensor: int | None,
    pipeline: int | None,
    expert: int | None,
    optimizer: str,
    sequences: int,
    checkpointing: bool,
    vocabulary: int | None,
    length_start: int | None,
    length_steps: int | None,
    runs: Path | None,
) -> _Planned:
    """The plan of the command's options."""
    counted = None if model is None else _counted(model, vocabulary, parameters)
    compute, rate = _compute(flops, gpus, days, gpu, mfu)
    found = counted[1] if counted else None
    budget = allocate(compute, found.active if found else parameters, tokens)
    shared, memory = ranks or gpus or 1, None
    sizes = {name: size for name, size in (("tensor", tensor), ("pipeline", pipeline), ("expert", expert)) if size}
    if counted is not None and model is not None and _is_of_megatron(counted[0]) and zero is None:
        layout, precision = _layout(model, sizes, ranks, gpus)
        shared, memory = layout.data, _of_megatron(counted[0], layout, precision, optimizer)
    elif sizes:
        raise BlockError(
            "--tensor-parallel, --pipeline-parallel and --expert-parallel are for a Megatron argument file"
        )
    elif counted is not None:
        kept = _passes(counted[0], sequences, length, checkpointing)
        memory = _memory(counted[0], 1 if zero is None else zero, shared, optimizer, kept)
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
    return _Planned(made, rate, None if runs is None else fit_optima(_read_runs(runs)))


def _other(context: typer.Context, options: dict[str, Any], text: str) -> dict[str, Any]:
    """The plan to compare with: of a file, or of this command's options with others in the place of some.

    A compute takes the place of tokens and the other way round, and --parameters that of a model.
    """
    if text.endswith(".json"):
        try:
            found = json.loads(Path(text).read_text())
        except ValueError as error:
            raise BlockError(f"{text} is no JSON ({error}); write it with blockwise-lr plan ... --json") from None
        if not isinstance(found, dict) or "adamw_lr" not in found:
            raise BlockError(f"{text} is no plan; write it with blockwise-lr plan ... --json")
        return found
    try:
        second = context.command.make_context("plan", shlex.split(text))
    except Exception as error:  # click's or, of a newer typer, typer's own: they have no common class
        if not hasattr(error, "format_message"):
            raise
        raise BlockError(f"--compare {text!r}: {error.format_message()}") from None
    given = {
        name: value
        for name, value in second.params.items()
        if getattr(second.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    if not given.keys() <= options.keys():
        raise BlockError(f"--compare {text!r}: --compare, --write and --json are said once, outside of it")
    gone = {name for one, others in _IN_PLACE_OF.items() if one in given for name in others} - given.keys()
    return _planned(**{**options, **dict.fromkeys(gone), **given}).as_dict()


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


def _passes(model: torch.nn.Module, sequences: int, length: int, checkpointing: bool) -> tuple[int, PassPeak] | None:
    """What a forward pass keeps, and the most of both passes; None for a model that is no transformers one, or does not run
    without contents."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    from .transformers.activations import activation_bytes, pass_peak

    try:
        with busy("running the model without contents"):
            kept = activation_bytes(config, sequences, length, checkpointing=checkpointing)
            return kept, pass_peak(config, sequences, length, checkpointing=checkpointing)
    except BlockError:
        return None


def _memory(
    model: torch.nn.Module, stage: int, ranks: int, optimizer: str, passes: tuple[int, PassPeak] | None
) -> Memory:
    block_map = map_blocks(model, family=getattr(model, "blockwise_family", None))
    states = largest_state_bytes(block_map, stage=stage, ranks=ranks, optimizer=optimizer)
    with_adamw = states if optimizer == "adamw" else largest_state_bytes(block_map, stage=stage, ranks=ranks)
    layout = f"ZeRO-{stage}"
    if passes is None:
        return Memory(layout, ranks, optimizer, states, with_adamw, None)
    peaks = [peak_bytes(of, stage, passes[1].gradients, passes[1].others) for of in (states, with_adamw)]
    return Memory(layout, ranks, optimizer, states, with_adamw, passes[0], *peaks)


def _is_of_megatron(model: torch.nn.Module) -> bool:
    return getattr(model, "blockwise_family", None) == "megatron"


def _layout(file: str, sizes: dict[str, int], ranks: int | None, gpus: int | None) -> tuple[MegatronLayout, str]:
    """The argument file's layout, with the sizes that were given in place of its own; and the precision."""
    said, precision = flags_of(shlex.split(Path(file).read_text(), comments=True))
    said |= sizes
    others = said.get("tensor", 1) * said.get("pipeline", 1)
    if ranks is None and gpus is not None and gpus % others:
        raise BlockError(f"--gpus {gpus} is no multiple of the {others} ranks that hold a model (TP x PP)")
    return MegatronLayout(**said, data=ranks or (gpus or others) // others), precision


def _of_megatron(model: torch.nn.Module, layout: MegatronLayout, precision: str, optimizer: str) -> Memory:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {
        kind: MegatronStates(shapes, model.config, layout, optimizer=kind, precision=precision).largest()  # type: ignore[arg-type]
        for kind in {optimizer, "adamw"}
    }
    return Memory(str(layout), layout.ranks, optimizer, found[optimizer], found["adamw"], None)


def _read_runs(file: Path) -> list[tuple[float, float, float]]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        return [(float(row["flops"]), float(row["parameters"]), float(row["loss"])) for row in rows]
    except (KeyError, ValueError, TypeError) as error:
        raise BlockError(f"{file} has a row without the numbers flops, parameters and loss ({error})") from None
