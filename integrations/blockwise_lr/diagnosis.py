"""The command ``blockwise-lr diagnose``: where a model has its norms, and whether it needs a learning-rate warmup."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .blocks import BlockError, map_blocks
from .inspection import find_factory, load_model
from .measure.depth import gradient_norms
from .measure.placement import DEEPNORM, NONE, POST, PRE, REORDERED, SANDWICH, Sublayer, placement_of, placements
from .terminal import busy, refuse, say

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_VOCABULARY, _MOST = 512, 1_000_000_000
# of the last layer's gradient at twice the depth over that at the depth; 1 / sqrt(2) is the law of pre-LN
_FLAT, _UNEVEN = 0.8, 10.0


@dataclass(frozen=True)
class Diagnosis:
    """What a forward pass and the gradients at initialization say.

    Attributes:
        placement: pre-LN, post-LN, sandwich, reordered, DeepNorm, none or unknown.
        of_attention, of_ffn: the same of each kind of sublayer.
        qk_norm: q and k are normalized.
        residual: factor of the residual over that of what is added to it.
        layers: the depth, and twice that where the model could be built so.
        gradients: for each depth, the expected gradient norm of every layer's feed-forward output weight.
        growth: of the last layer's, from the depth to twice that; None where there is one depth only.
        unevenness: the largest of the layers' over the smallest, at the greatest depth.
        needs_warmup: by arXiv 2002.04745; None where no publication says.
        why: in words.
    """

    placement: str
    of_attention: str
    of_ffn: str
    qk_norm: bool
    residual: float
    layers: tuple[int, ...]
    gradients: tuple[tuple[float, ...], ...]
    growth: float | None
    unevenness: float
    needs_warmup: bool | None
    why: str


def diagnose_model(builders: list[Callable[[], torch.nn.Module]], *, seeds: int = 5) -> Diagnosis:
    """Diagnoses a model that can be built anew with random weights.

    Args:
        builders: one that makes it, and perhaps another that makes it twice as deep.
        seeds: initializations.

    Raises:
        BlockError: no Transformer layer is seen, or the model returns no logits.
    """
    sublayers: list[Sublayer] = []
    gradients: list[tuple[float, ...]] = []
    for build in builders:
        torch.manual_seed(0)
        model = build().eval()
        block_map = map_blocks(model, strict=False, family=getattr(model, "blockwise_family", None))
        vocabulary = _vocabulary(model)
        with torch.no_grad():
            for p in model.parameters():  # weights of 0 and 1 would hide what they scale
                p.normal_(0, 0.1) if p.dim() > 1 else p.normal_(1, 0.1)
        ids = torch.randint(vocabulary, (2, 8))
        found = placements(model, block_map, ids)
        sublayers = sublayers or found
        names = [sublayer.output for sublayer in found if sublayer.kind == "ffn"]
        if not names:
            raise BlockError("no feed-forward network ran; give a Transformer with its layers")
        gradients.append(tuple(gradient_norms(build, names, vocabulary, seeds=seeds)))
    placement = placement_of(sublayers)
    growth = gradients[1][-1] / gradients[0][-1] if len(gradients) > 1 and gradients[0][-1] else None
    deepest = gradients[-1]
    unevenness = max(deepest) / max(min(deepest), 1e-30)
    attention = [one for one in sublayers if one.kind == "attention"]
    needs, why = _verdict(placement, growth, unevenness)
    return Diagnosis(
        placement,
        placement_of(attention) if attention else "unknown",
        placement_of([one for one in sublayers if one.kind == "ffn"]),
        any(one.qk_norm for one in attention),
        round(sublayers[-1].residual, 3),
        tuple(map(len, gradients)),
        tuple(gradients),
        growth,
        unevenness,
        needs,
        why,
    )


def _verdict(placement: str, growth: float | None, unevenness: float) -> tuple[bool | None, str]:
    falls = "" if growth is None else f"the last layer's gradient is x{growth:.2f} at twice the depth"
    flat = growth is not None and growth >= _FLAT
    needs: bool | None = None
    if placement == POST:
        needs = True if growth is None or flat else None
        why = "norms lie behind the additions"
        if flat:
            why += f", and {falls}: it does not fall with depth, so the first steps at the peak move the last layers too far"
        elif falls:
            why += f"; {falls}, so the initialization tempers it: warm up unless a run without it holds"
    elif placement == PRE:
        needs, why = (
            False,
            "norms lie before the sublayers; models of this kind trained without warmup in arXiv 2002.04745",
        )
        if flat:
            why += (
                f". Here {falls}, as after post-LN: an initialization that shrinks with depth, as GPT-2's, does that, so the "
                f"gradient alone does not tell them apart"
            )
        elif falls:
            why += f"; {falls}, and by its theorem 1 falls as 1 / sqrt(depth)"
        why += ". Large rates and batches still want a warmup"
    elif placement in (SANDWICH, REORDERED):
        why = (
            f"norms lie {'on both sides of' if placement == SANDWICH else 'behind'} the sublayers, before the addition; no "
            f"publication trains this without warmup, and its models were trained with one"
            + (f"; {falls}" if falls else "")
        )
    elif placement == DEEPNORM:
        why = "post-LN with scaled residuals (DeepNorm), which its authors trained with a warmup" + (
            f"; {falls}" if falls else ""
        )
    elif placement == NONE:
        why = "no norm lies at the additions, so nothing keeps the layers' outputs in bounds; warm up"
    else:
        why = "what is added to what was not recognized, so say nothing of it"
    if unevenness > _UNEVEN:
        why += f". Layers' gradients differ by a factor of {unevenness:.0f}: some dominate the first steps"
    return needs, why


def _vocabulary(model: torch.nn.Module) -> int:
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if not tables:
        raise BlockError("the model has no torch.nn.Embedding, whose size tells which token ids it takes")
    return min(getattr(getattr(model, "config", None), "vocab_size", None) or max(tables), _VOCABULARY)


def builders_of(target: str, layers: int) -> list[Callable[[], torch.nn.Module]]:
    """What makes a target's model of so many layers, and of twice as many.

    Args:
        target: a Hugging Face config (file or folder), or ``package.module:factory``; a factory that takes an argument is
            given the number of layers.

    Raises:
        BlockError: the target is neither, or its model is too large to be built here.
    """
    if ":" in target and not os.path.exists(target):
        factory: Callable[..., Any] = find_factory(target)
        if not inspect.signature(factory).parameters:
            return [factory]
        return [lambda: factory(layers), lambda: factory(2 * layers)]
    if os.path.isfile(target) and not target.endswith(".json"):
        raise BlockError("diagnose runs the model, which needs a Hugging Face config or package.module:factory")
    model = load_model(target)
    config = getattr(model, "config", None)
    if config is None:
        raise BlockError("diagnose runs the model, which needs a Hugging Face config or package.module:factory")
    deep = with_depth(config, 2 * layers)
    with torch.device("meta"):
        numel = sum(p.numel() for p in type(model)(deep).parameters())
    if numel > _MOST:
        raise BlockError(
            f"{2 * layers} layers of this config have {numel / 1e9:.1f}B parameters, too many for this; give fewer --layers, "
            f"or a config of a smaller width, on which the placement of norms does not depend"
        )
    return [lambda: type(model)(with_depth(config, layers)), lambda: type(model)(copy.deepcopy(deep))]


def with_depth(config: Any, layers: int) -> Any:
    """A copy of a Hugging Face config with so many layers and a small table of tokens.

    Raises:
        BlockError: the config does not say its depth by a name that is known.
    """
    config = copy.deepcopy(config)
    names = [name for name in _DEPTHS if isinstance(getattr(config, name, None), int)]
    if not names:
        raise BlockError(f"the config says its depth by none of {', '.join(_DEPTHS)}; give package.module:factory")
    before = {getattr(config, name) for name in names}
    for name, value in list(vars(config).items()):  # lists with an entry per layer go on in their pattern
        if isinstance(value, list) and value and len(value) in before:
            setattr(config, name, [value[number % len(value)] for number in range(layers)])
    for name in names:
        setattr(config, name, layers)
    for name in ("vocab_size",):
        if getattr(config, name, 0) > _VOCABULARY:
            setattr(config, name, _VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), (int, list)):
            setattr(config, name, None)
    return config


def draw(found: Diagnosis, path: Path) -> None:
    """Writes a picture of the gradients by layer.

    Raises:
        ImportError: matplotlib is not installed.
        BlockError: the file's suffix is no picture's.
    """
    if path.suffix not in (".svg", ".png"):
        raise BlockError(f"--plot {path} is no picture; write FILE.svg or FILE.png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for depth, norms in zip(found.layers, found.gradients):
        axes.plot(range(1, depth + 1), norms, marker="o", label=f"{depth} layers")
    axes.set(
        yscale="log",
        xlabel="layer",
        ylabel="gradient norm of the FFN's output weight",
        title=f"{found.placement}, at initialization",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def diagnose(
    target: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face config, file or folder, or package.module:factory, which may take a number of layers."
        ),
    ],
    layers: Annotated[int, typer.Option(help="Depth to build; gradients are compared with twice that.")] = 6,
    seeds: Annotated[int, typer.Option(help="Initializations.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Draw the gradients by layer into this file (.svg, .png).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell where a model has its norms and whether it needs a warmup. Exit code 2: bad input."""
    try:
        if layers < 1 or seeds < 1:
            raise BlockError("--layers and --seeds are 1 or above")
        with busy(f"measuring gradients over {seeds} initializations"):
            found = diagnose_model(builders_of(target, layers), seeds=seeds)
        if plot is not None:
            draw(found, plot)
    except ImportError as error:
        refuse("diagnose", f"a library is missing ({error})")
    except (BlockError, OSError, ValueError) as error:
        refuse("diagnose", error)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    say(f"norms: {found.placement}" + (", with QK norm" if found.qk_norm else ""))
    if found.of_attention != found.of_ffn:
        say(f"  attention {found.of_attention}, feed-forward {found.of_ffn}")
    for depth, norms in zip(found.layers, found.gradients):
        shown = " ".join(f"{norm:.3g}" for norm in norms)
        say(f"expected gradient norm of the FFN's output weight, {depth} layers: {shown}")
    verdict = {True: "needs a warmup", False: "can train without a warmup", None: "warm up"}[found.needs_warmup]
    say(f"{verdict}: {found.why}")
