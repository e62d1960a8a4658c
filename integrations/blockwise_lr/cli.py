"""The commands of ``blockwise-lr``."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .blocks import PRESETS, BlockError, BlockType
from .diagnosis import diagnose
from .inspection import UNMAPPED, PresetRow, Row, as_json, folded, inspect_model, inspect_presets, load_model, totals
from .plan_command import plan
from .report_command import report
from .schedule_view import ratio_of, schedule
from .submit_command import jobs, submit
from .terminal import EXIT_CONTRADICTED, EXIT_UNMAPPED, busy, console, refuse, refuse_without
from .tune_command import tune
from .tune_seqlen_command import tune_seqlen

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One learning rate per Transformer block type.",
)


class Format(str, Enum):
    """How inspect prints."""

    table = "table"
    json = "json"
    svg = "svg"
    png = "png"


@app.callback()
def _commands() -> None:
    """Keeps typer from making a single command the whole program."""


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face config folder or config.json, a Megatron argument file, or package.module:factory."
        ),
    ],
    rules: Annotated[
        Path | None, typer.Option(help="JSON file with a list of block rules of your own, for blocks and rates.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Base learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.1,
    ratio: Annotated[
        list[str] | None,
        typer.Option(help=f"A ratio of your own, as in --ratio qk=4, or a preset: {', '.join(PRESETS)}."),
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Rows of the embedding, for an argument file.")] = None,
    form: Annotated[Format, typer.Option("--format", help="Output; svg and png draw a picture.")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="Where to write it; needed for svg and png.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="A row for every parameter; repeated layers are one otherwise.")
    ] = False,
    presets: Annotated[
        bool,
        typer.Option("--presets", help="Show instead what each preset gives; --ratio base_hidden_size=256 for some."),
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Run a few layers and see what feeds attention.")] = False,
) -> None:
    """Show which row of which parameter is which block type. Exit code 3: something is unmapped; 4: what the model runs
    contradicts the map; 2: bad input."""
    try:
        ratios = dict(ratio_of(item) for item in ratio or ())
        own = json.loads(rules.read_text()) if rules else None
        model = load_model(target, vocabulary)
        if presets:
            return _write_presets(inspect_presets(model, rules=own, ratios=ratios), form, output)
        rows = inspect_model(model, rules=own, lr=lr, weight_decay=weight_decay, ratios=ratios)
    except (BlockError, OSError, ValueError) as error:
        refuse("inspect", error)
    _write(rows, form, output, every)
    if verify:
        _verify(target, own)
    if UNMAPPED in totals(rows):
        typer.echo(
            "blockwise-lr inspect: parameters marked UNMAPPED match no rule; add rules with --rules, for example "
            '[{"match": "*.name.*", "block": "ffn"}]',
            err=True,
        )
        raise typer.Exit(EXIT_UNMAPPED)


def _verify(target: str, rules: list[dict] | None) -> None:
    from .verification import verify

    try:
        with busy("following what every parameter feeds"):
            found = verify(target, rules=rules)
    except (BlockError, ImportError, AttributeError) as error:
        refuse("inspect", error)
    typer.echo(f"verified: {found.proven} parameters feed the attention that the map says", err=True)
    for wrong in found.contradicted:
        typer.echo(
            f"contradicted: {wrong.parameter}, {wrong.where}: mapped as {wrong.block}, feeds the {wrong.feeds}",
            err=True,
        )
    for rule in found.proposed:
        typer.echo(f"unmapped, and by what it feeds: {json.dumps(rule)}", err=True)
    if found.contradicted:
        raise typer.Exit(EXIT_CONTRADICTED)


def _write(rows: list[Row], form: Format, output: Path | None, every: bool) -> None:
    if form in (Format.svg, Format.png):
        if output is None or output.suffix != f".{form.value}":
            refuse("inspect", f"--format {form.value} needs --output FILE.{form.value}")
        try:
            from .picture import draw

            draw(rows, output)
        except ImportError as error:
            refuse("inspect", f"a picture needs matplotlib; pip install matplotlib ({error})")
    elif form is Format.json:
        typer.echo(as_json(rows)) if output is None else output.write_text(as_json(rows) + "\n")
    else:
        _print_rows(rows, output, every)


def _write_presets(rows: list[PresetRow], form: Format, output: Path | None) -> None:
    if form not in (Format.table, Format.json):
        refuse("inspect", f"--presets is printed as a table or as JSON, and --format is {form.value}; leave that out")
    if form is Format.json:
        text = json.dumps({row.name: asdict(row) for row in rows}, indent=1)
        typer.echo(text) if output is None else output.write_text(text + "\n")
        return
    out = console() if output is None else Console(record=True, width=200, file=io.StringIO())
    blocks = list(next(row for row in rows if row.ratios).ratios)
    table = Table("preset", title="ratios, peak learning rate over the base learning rate")
    for block in blocks:
        table.add_column(block, justify="right")
    for row in rows:
        table.add_row(row.name, *(f"{row.ratios[block]:.4g}" if row.ratios else "?" for block in blocks))
    out.print(table)
    for row in rows:
        out.print(f"{row.name}: {row.missing or row.source}", highlight=False, markup=False)
    if output is not None:
        output.write_text(out.export_text())


def _print_rows(rows: list[Row], output: Path | None, every: bool) -> None:
    out = console() if output is None else Console(record=True, width=200, file=io.StringIO())
    is_narrow = out.width < 100  # then names come first: shapes and decay are in --format json
    table = Table()
    table.add_column("parameter", overflow="fold")
    if not is_narrow:
        table.add_column("shape", no_wrap=True)
    table.add_column("rows or columns")
    table.add_column("block", no_wrap=True)
    for column in ("ratio", "peak lr") if is_narrow else ("ratio", "peak lr", "weight decay"):
        table.add_column(column, justify="right")
    for row, _ in [(row, 1) for row in rows] if every else folded(rows):
        shape, decay = " x ".join(map(str, row.shape)), f"{row.weight_decay:g}"
        table.add_row(
            row.parameter,
            *([] if is_narrow else [shape]),
            row.where,
            row.block,
            f"{row.ratio:g}",
            f"{row.peak_lr:.3g}",
            *([] if is_narrow else [decay]),
            style="red" if row.block == UNMAPPED else None,
        )
    if is_narrow:
        table.caption = "shapes and weight decay: in 100 columns, or --format json"
    out.print(table)
    sums = Table("block", title="totals")
    sums.add_column("parameters", justify="right")
    sums.add_column("share", justify="right")
    everything = sum(row.numel for row in rows)
    for block, numel in totals(rows).items():
        sums.add_row(block, f"{numel:,}", f"{numel / everything:.1%}")
    sums.add_row("all", f"{everything:,}", "")
    out.print(sums)
    if output is not None:
        output.write_text(out.export_text())


@app.command()
def sharpness(
    folder: Annotated[str, typer.Argument(help="A folder that save_pretrained has written.")],
    tokens: Annotated[
        Path, typer.Option(help="Token ids: a .npy file, or a .bin file of uint16 as GPT-2 trainers use.")
    ],
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    batch: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    batches: Annotated[int, typer.Option(help="Batches, taken evenly over the file.")] = 4,
    draws: Annotated[int, typer.Option(help="Draws of labels for each batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    gradient_noise: Annotated[
        bool,
        typer.Option("--gradient-noise", help="Measure signal and noise of gradients too; an even number of batches."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how sharp the loss is in each block type of a saved model. Exit code 2: bad input."""
    from .measure import measure_gradient_noise, measure_sharpness, read_batches

    try:
        from .transformers.checkpoints import load_causal_lm

        read = read_batches(tokens, length, batch, batches)
        model = load_causal_lm(folder)
        with busy(f"measuring, {batches} batches of {draws} draws"):
            noise = measure_gradient_noise(model, read).as_dict() if gradient_noise else None
            found = measure_sharpness(model, read, draws=draws, seed=seed)
    except ImportError as error:
        refuse_without("sharpness", "transformers", "transformers", error)
    except (BlockError, OSError, ValueError) as error:
        refuse("sharpness", error)
    if as_json:
        typer.echo(json.dumps(found.as_dict() | ({"gradient_noise": noise} if noise else {}), indent=1))
        return
    table = Table("block", title=f"sharpness, {found.tokens:,} predicted tokens, {draws * batches} draws")
    for column in ("parameters", "trace / parameters", "standard error", "over the norms'"):
        table.add_column(column, justify="right")
    for column in ("gradient's signal / noise", "equal at tokens") if noise else ():
        table.add_column(column, justify="right")
    blocks = found.blocks()
    norm = blocks.get(BlockType.NORM)
    for block, estimate in sorted(blocks.items(), key=lambda item: item[1].sharpness):
        over = "" if norm is None else f"{estimate.sharpness / norm.sharpness:.3g}"
        table.add_row(
            block.value,
            f"{estimate.numel:,}",
            f"{estimate.sharpness:.3g}",
            f"{estimate.error / estimate.sharpness:.0%}",
            over,
            *(_noise_cells(noise["blocks"][block.value]) if noise else ()),
        )
    out = console()
    out.print(table)
    out.print(
        "from flat to sharp: "
        + " < ".join(" ~ ".join(b.value for b in level) for level in found.order())
        + "  (~: not told "
        "apart at two standard errors)"
    )


def _noise_cells(of: dict[str, float]) -> tuple[str, str]:
    return f"{of['signal_to_noise']:.2g} ± {of['error']:.1g}", f"{of['noise_scale']:,.0f}"


app.command()(tune)
app.command("tune-seqlen")(tune_seqlen)
app.command()(schedule)
app.command()(diagnose)
app.command()(plan)
app.command()(report)
app.command()(submit)
app.command()(jobs)


@app.command()
def families(
    installed: Annotated[
        bool, typer.Option("--installed", help="All classes of the installed transformers, by category (minutes).")
    ] = False,
) -> None:
    """Map a public model of every known family and count. Exit code 3: something is unmapped."""
    try:
        if installed:
            return _installed()
        from .transformers.public_models import PUBLIC_MODELS, Survey, survey

        with busy("mapping") as status:
            found: list[Survey] = []
            for model in PUBLIC_MODELS:
                status.update(f"mapping {model.name}, {len(found)} of {len(PUBLIC_MODELS)} done")
                found.append(survey(model))
    except ImportError as error:
        refuse_without("families", "transformers", "transformers", error)
    table = Table("model", "family", caption="depth cut to the fewest layers that show every kind of layer")
    for column in ("mapped parameters", "spans", "unmapped"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(row.model, row.family, str(row.mapped), str(row.spans), str(row.unmapped))
    console().print(table)
    if any(row.unmapped for row in found):
        raise typer.Exit(EXIT_UNMAPPED)


def _installed() -> None:
    from .transformers.coverage import coverage

    table = Table("category", caption="from default configs; not built: a value or a library is missing")
    for column in ("mapped", "refused", "not built"):
        table.add_column(column, justify="right")
    refused: dict[str, str] = {}
    for row in coverage():
        table.add_row(row.category, str(len(row.mapped)), str(len(row.refused)), str(len(row.not_built)))
        refused |= row.refused
    console().print(table)
    for name, error in refused.items():
        typer.echo(f"{name}: {error}")
    if refused:
        raise typer.Exit(EXIT_UNMAPPED)


def _without_gaps(versions: str) -> str:
    """A range in few words: versions within that are left out are counted."""
    bounds = versions.split(",")
    kept = [bound for bound in bounds if not bound.startswith("!=")]
    gaps = len(bounds) - len(kept)
    return ",".join(kept) + (f" but {gaps}" if gaps else "")


@app.command()
def doctor(
    every: Annotated[
        bool, typer.Option("--patches", help="List every patch, and all that is read of upstream.")
    ] = False,
) -> None:
    """Show what is wrong with the installed packages, their versions, usable kernels, and whose Apex is installed."""
    from . import __version__
    from . import doctor as health

    out = console()
    states = health.patches()
    wrong = [(patch, state) for patch, state in states if health.is_problem(state)]
    for patch, state in wrong:
        out.print(f"[red]{patch.name}[/red] ({patch.package} {patch.versions}): {state}", highlight=False)
    locks = health.stale_locks()
    for lock in locks:
        out.print(f"[red]{lock}[/red]: a build that was killed has left it, and the next one waits for it; remove it")
    if not wrong and not locks:
        out.print("no problems: all that is installed is of a supported version, or not patched")
    found = Table("package", "version", title=f"blockwise-lr {__version__}")
    for package, version in health.versions().items():
        found.add_row(package, version)
    found.add_row("apex", health.apex())
    out.print(found)
    kernels = Table("kernel", "usable")
    for name, state in health.kernels().items():
        kernels.add_row(name, state)
    out.print(kernels)
    if not every:
        out.print(f"{len(states)} patches and lists of what is read of upstream: blockwise-lr doctor --patches")
        return
    patches = Table()
    for column in ("patch", "for", "state", "changes", "why"):
        patches.add_column(column, overflow="fold")
    for patch, state in states:
        patches.add_row(
            patch.name,
            f"{patch.package} {_without_gaps(patch.versions)}",
            state,
            "\n".join(symbol.path.rpartition(":")[2] for symbol in patch.symbols),
            patch.why,
        )
    out.print(patches)


if __name__ == "__main__":
    app()
