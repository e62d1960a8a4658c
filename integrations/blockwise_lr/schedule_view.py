"""The command ``blockwise-lr schedule``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .blocks.presets import PRESETS, lr_ratios
from .blocks.types import BlockError, BlockType, did_you_mean, finite
from .schedules.curves import Curve
from .schedules.schedulers import SCHEDULES
from .terminal import console, refuse

_SHOWN = ("embedding", "head", "qk", "ffn", "vo", "norm")


def schedule(
    target: Annotated[
        str, typer.Argument(help=f"A ds_config with optimizer and scheduler, or a type: {', '.join(SCHEDULES)}.")
    ],
    settings: Annotated[list[str] | None, typer.Argument(help="Its settings, as in warmup_num_steps=1000.")] = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate.")] = None,
    ratio: Annotated[
        list[str] | None, typer.Option(help=f"A ratio of your own, as in qk=4, or a preset: {', '.join(PRESETS)}.")
    ] = None,
    beta2: Annotated[float, typer.Option(help="For warmup_num_steps=auto.")] = 0.95,
    steps: Annotated[
        int | None, typer.Option(help="Up to which step (token); where the schedule ends by default.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="Draw all block types into this file (.svg, .png).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the rates of every row.")] = False,
) -> None:
    """Show the learning rate of every block type over a schedule. Exit code 2: bad input."""
    try:
        name, given, params = _read(target, settings or [])
        rate = finite(params.get("lr", 1e-3)) if lr is None else lr
        if rate is None or rate <= 0:
            raise BlockError(f"lr is {params.get('lr')!r}; give --lr")
        ratios = _ratios(ratio, params.get("block_lr_ratios"))
        betas = params.get("betas", (0.9, beta2))
        curve = SCHEDULES[name].curve_type.checked(given, f"{name}: ").with_warmup(float(betas[1]))
        curve.refuse_long_warmups(ratios)
        low = next(
            float(low) for low in (curve.min_lr, params.get("min_lr"), rate / curve.floor_share) if low is not None
        )
        curve.refuse_low(low)
        end = steps or _end(curve)
        found = sampled(curve, rate, low, ratios, end, max(rows, 2))
        if plot is not None:
            draw(curve, name, rate, low, ratios, end, plot)
    except ImportError as error:
        refuse("schedule", f"a picture needs matplotlib; pip install matplotlib ({error})")
    except (BlockError, OSError, ValueError) as error:
        refuse("schedule", error)
    if as_json:
        typer.echo(json.dumps({"schedule": name, "lr": rate, "min_lr": low, "rates": found}))
        return
    table = Table("token" if curve.tokens_per_step else "step", title=f"{name}, lr {rate:g}, min_lr {low:g}")
    for block in ratios:
        table.add_column(block, justify="right")
    for at, rates in found.items():
        table.add_row(f"{at:,}", *(f"{value:.3g}" for value in rates.values()))
    console(120).print(table)


def sampled(
    curve: Curve, lr: float, low: float, ratios: Mapping[str, float], end: int, rows: int
) -> dict[int, dict[str, float]]:
    """The rates of every block type at so many steps, from the first to the last."""
    places = sorted({max(round(1 + (end - 1) * row / (rows - 1)), 1) for row in range(rows)})
    starts = _starts(curve, ratios)
    return {at: curve.rates(at, lr, low, ratios, starts) for at in places}


def draw(curve: Curve, name: str, lr: float, low: float, ratios: Mapping[str, float], end: int, path: Path) -> None:
    """Writes a picture of all block types' rates, the axis of rates being logarithmic.

    Raises:
        ImportError: matplotlib is not installed.
        BlockError: the file's suffix is no picture's.
    """
    if path.suffix not in (".svg", ".png"):
        raise BlockError(f"--plot {path} is no picture; write FILE.svg or FILE.png")
    from matplotlib.figure import Figure

    from .picture import COLORS

    found = sampled(curve, lr, low, ratios, end, 800)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for block in ratios:
        axes.plot(list(found), [rates[block] for rates in found.values()], color=COLORS[block], label=block)
    axes.set_yscale("log")
    axes.set(xlabel="tokens" if curve.tokens_per_step else "optimizer steps", ylabel="learning rate", title=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _starts(curve: Curve, ratios: Mapping[str, float]) -> dict[str, float] | None:
    """Where the warmup begins, as far as the settings say; a checkpoint's rates are not there, so 0."""
    starts = getattr(curve, "starts", None)
    return None if starts is None else starts(list(ratios))


def _end(curve: Curve) -> int:
    if curve.end is not None:
        return curve.end + getattr(curve, "begin_num_steps", 0)
    return max(curve.warmup_num_steps + getattr(curve, "cooldown_num_steps", 0), 1) * 4


def _read(target: str, settings: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A scheduler's type, its settings, and the optimizer's parameters."""
    said = dict(_setting(text) for text in settings)
    if target.endswith(".json"):
        config = json.loads(Path(target).read_text())
        scheduler = config.get("scheduler") or {}
        name, said = scheduler.get("type"), {**scheduler.get("params", {}), **said}
        params = (config.get("optimizer") or {}).get("params", {})
    else:
        name, params = target, {}
    if name not in SCHEDULES:
        raise BlockError(f"unknown schedule {name!r}{did_you_mean(name, SCHEDULES)}; use one of {', '.join(SCHEDULES)}")
    said.pop("last_batch_iteration", None)
    missing = [
        one.name
        for one in list(inspect.signature(SCHEDULES[name]).parameters.values())[1:]
        if one.default is inspect.Parameter.empty and one.name not in said
    ]
    if missing:
        unknown = next((key for key in said if key not in inspect.signature(SCHEDULES[name]).parameters), None)
        instead = "" if unknown is None else f" in place of {unknown}, which it does not know"
        raise BlockError(f"{name} needs {missing[0]}: write {missing[0]}=...{instead}")
    return name, said, params


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BlockError(f"{text!r} is not KEY=VALUE, as in warmup_num_steps=1000")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _ratios(given: list[str] | None, configured: Any) -> dict[str, float]:
    """Those of the blocks that a plain Transformer has, and of others that were named."""
    values = dict(ratio_of(text) for text in given) if given else configured
    ratios = lr_ratios(values)
    named = set(values) if isinstance(values, Mapping) else set()
    return {block.value: ratios[block] for block in BlockType if block.value in {*_SHOWN, *named}}


def ratio_of(item: str) -> tuple[str, float | str]:
    """A ratio as it is written on the command line, or a preset.

    Raises:
        BlockError: neither.
    """
    name, equals, value = item.partition("=")
    if not equals:
        return "preset", name
    try:
        return name, float(value)
    except ValueError:
        raise BlockError(f"--ratio {item} is not BLOCK=NUMBER, as in qk=4") from None
