"""Ratios with a name: ``"block_lr_ratios": "uniform"``, or ``{"preset": "uniform", "embedding": 10}`` to change some.

Those that follow from a model's size take ``base_hidden_size`` and ``base_num_layers`` beside the name (as Megatron calls the
size at which rates were tuned), and read the model's own from its config: ``{"preset": "mup", "base_hidden_size": 256}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .types import DEFAULT_RATIO_OF, PAPER_RATIOS, BlockError, BlockType, block_values, did_you_mean, finite, shown

DEFAULT = "embedding"  # what won the comparison of examples/reproduce
# What a preset may be given beside ratios, and how configs spell the model's own.
BASES = {"base_hidden_size": "hidden_size", "base_num_layers": "num_layers"}
_SPELLINGS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "embed_dim"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
}
SIZES = (*BASES, *_SPELLINGS)
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Scaled:
    """A ratio that follows a model's size: factor x (hidden_size / base)^width x (num_layers / base)^depth."""

    factor: float = 1.0
    width: float = 0.0
    depth: float = 0.0


@dataclass(frozen=True)
class Preset:
    """Ratios, and where they come from.

    Attributes:
        ratios: peak learning rate of block types over ``lr``; the others follow (see types.DEFAULT_RATIO_OF).
        source: who found them, on what, and what a model must have for them.
        bases: the base sizes that the source states.
        is_muons: they are over the learning rate of Muon's matrices, whose updates are scaled as in its first version.
    """

    ratios: Mapping[BlockType, float | Scaled]
    source: str
    bases: Sizes = field(default_factory=dict)
    is_muons: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """The base sizes that the ratios depend on."""
        scaled = [ratio for ratio in self.ratios.values() if isinstance(ratio, Scaled)]
        width, depth = any(one.width for one in scaled), any(one.depth for one in scaled)
        return tuple(base for base, wanted in zip(BASES, (width, depth)) if wanted)

    @property
    def sizes(self) -> tuple[str, ...]:
        """What may be given beside its name: base sizes that it does not state, and the model's own."""
        return tuple(one for base in self.wanted for one in (base, BASES[base]) if one not in self.bases)

    def of_size(self, multiples: Mapping[str, float]) -> dict[BlockType, float]:
        """The ratios of a model of these multiples of the base sizes."""
        width, depth = (multiples.get(base, 1.0) for base in BASES)
        return {
            block: ratio.factor * width**ratio.width * depth**ratio.depth if isinstance(ratio, Scaled) else ratio
            for block, ratio in self.ratios.items()
        }


def _roles(embedding: Any, head: Any, matrices: Any, norm: Any, others: Any = None) -> dict[BlockType, Any]:
    hidden = dict.fromkeys((BlockType.QK, BlockType.VO, BlockType.FFN), matrices)
    other = dict.fromkeys((BlockType.ROUTER, BlockType.SSM), matrices if others is None else others)
    return {BlockType.EMBEDDING: embedding, BlockType.HEAD: head, **hidden, BlockType.NORM: norm, **other}


_ONES = dict.fromkeys(PAPER_RATIOS, 1.0)

PRESETS: Mapping[str, Preset] = {
    "paper": Preset(PAPER_RATIOS, "arXiv 2502.19002, tuned by hand on one LLaMA of 0.25B parameters"),
    "uniform": Preset(_ONES, "one learning rate for all, as AdamW; what everything else is to be compared with"),
    "embedding": Preset(
        {**_ONES, BlockType.EMBEDDING: 10.0},
        "the default: embedding and head at ten times the rate of all the rest, which keeps AdamW's; the best of what was "
        "tried on small LLaMAs in short runs (examples/reproduce, arm embedding-head-10)",
    ),
    "sqrt_width": Preset(
        _roles(Scaled(width=0.5), 1.0, 1.0, 1.0),
        "the embedding's rate over the others grows as sqrt(hidden_size / base_hidden_size), for vocabularies much larger "
        "than the width (arXiv 2506.15025); base_hidden_size 1 is sqrt(hidden_size) itself",
    ),
    "mup": Preset(
        _roles(1.0, Scaled(width=-1), Scaled(width=-1), 1.0),
        "Adam's rates of muP (arXiv 2203.03466, table 3): head and matrices by 1 / width; for models without multipliers in "
        "their forward pass, whose head starts at a standard deviation of 1 / width",
    ),
    "completep": Preset(
        _roles(1.0, 1.0, Scaled(width=-1), 1.0),
        "CompleteP's rates (arXiv 2505.01618, alpha 1): matrices by 1 / width, nothing by depth; for models that multiply "
        "logits by 1 / width and residual branches by 1 / depth",
    ),
    "depth_mup": Preset(
        _roles(1.0, 1.0, Scaled(width=-1, depth=-0.5), Scaled(depth=-0.5)),
        "the same with alpha 1/2 (depth-muP, arXiv 2310.02244): matrices by 1 / (width sqrt(depth)), norms by "
        "1 / sqrt(depth), the last one too; for models that multiply logits by 1 / width and residual branches by "
        "1 / sqrt(depth)",
    ),
    "nanochat": Preset(
        _roles(Scaled(10.0, width=-0.5), Scaled(0.2, width=-0.5), 1.0, 0.25, 0.25),
        "karpathy/nanochat 92d63d4 over Muon's lr of 0.02: embedding 0.2 and head 0.004, times (hidden_size / 768)^-0.5; "
        "norms, routers and state-space mixers, which it has none of, take the 0.005 of its residual scalars",
        bases={"base_hidden_size": 768},
        is_muons=True,
    ),
    "modded_nanogpt": Preset(
        _roles(0.008 / 0.023, 0.008 / 0.023, 1.0, 0.008 / 0.023, 0.008 / 0.023),
        "KellerJordan/modded-nanogpt f411b3d over NorMuon's lr of 0.023: embedding and head 0.008, and norms, routers and "
        "state-space mixers, which it has none of, as its post_lambdas; its down projections' factor of 2 needs a rule "
        "with lr_scale",
        is_muons=True,
    ),
}


def lr_ratios(
    values: str | Mapping[str, Any] | None = None,
    own: Mapping[str, float | None] = MappingProxyType({}),
    config: Mapping[str, Any] | None = None,
) -> dict[BlockType | str, float]:
    """The ratio of every block type: the given one, else the preset's (:data:`DEFAULT` where none is named), else that of
    a similar block type. Behind them, that of every block of the user's own: the given one, else its rule's.

    Args:
        values: a preset's name, or ratios by block type, among them perhaps ``preset`` with such a name, and sizes for it.
        own: name of a block of the user's own -> the ratio that its rule states, None where it states none.
        config: the model's, where presets by size find it; :data:`ANY_SIZE` where no model is there yet.

    Raises:
        BlockError: an unknown name, a ratio that is negative, not finite or not a number, a ratio of 0 (to freeze a
            block, set requires_grad=False), none for a block of the user's own, or a size that is not known.
    """
    given: Any = {"preset": values} if isinstance(values, str) else values
    name = preset_of(given) or DEFAULT
    sizes = {}
    if isinstance(given, Mapping):
        sizes = {key: given[key] for key in given if key in SIZES}
        given = {block: ratio for block, ratio in given.items() if block != "preset" and block not in sizes}
    said = block_values(given, "block_lr_ratios", positive=True, own=own)
    ratios: dict[BlockType | str, float] = dict(PRESETS[name].of_size(_multiples(name, sizes, config))) | said
    found: dict[BlockType | str, float] = {
        block: ratios[block] if block in ratios else ratios[DEFAULT_RATIO_OF[block]] for block in BlockType
    }
    for block, ratio in own.items():
        stated = said.get(block, ratio)
        if stated is None:
            raise BlockError(
                f"the block {block!r} of block_rules has no ratio; add lr_ratio to its rule, or name it in block_lr_ratios"
            )
        found[block] = stated
    return found


def preset_of(values: Any) -> str | None:
    """The preset that ``block_lr_ratios`` names.

    Raises:
        BlockError: there is none of that name.
    """
    name = values.get("preset") if isinstance(values, Mapping) else values
    if name is None or not (isinstance(values, str) or "preset" in values):
        return None
    if name == "auto":
        raise BlockError(
            "block_lr_ratios is 'auto', and ratios cannot be found without data that the steps do not see: use blockwise-lr "
            "tune, or blockwise_lr.measure.AutoRatios in a loop of yours, which did worse than kept ratios in our runs"
        )
    if not isinstance(name, str) or name not in PRESETS:
        raise BlockError(
            f"block_lr_ratios names the preset {shown(name)}{did_you_mean(name, PRESETS)}; use one of {', '.join(PRESETS)}, "
            f"or ratios by block type"
        )
    return name


ANY_SIZE: Mapping[str, Any] = MappingProxyType({spellings[0]: 1 for spellings in _SPELLINGS.values()})


def _multiples(name: str, sizes: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, float]:
    """Of each base size that a preset wants, what multiple of it the model has."""
    preset, known = PRESETS[name], config or {}
    for key, value in sizes.items():
        number = finite(value)
        if number is None or number < 1 or number != round(number):
            raise BlockError(f"block_lr_ratios[{key!r}] is {shown(value)}; give a whole number, 1 or above")
        if key not in preset.sizes:
            takes = ", ".join(preset.sizes) or "no size"
            raise BlockError(f"block_lr_ratios has {key}, and the preset {name} takes {takes}; leave {key} out")
    bases = {**preset.bases, **sizes}
    lacks = next((base for base in preset.wanted if base not in bases), None)
    if lacks is not None:
        example = json.dumps({"preset": name, **{base: 256 if "hidden" in base else 8 for base in preset.wanted}})
        raise BlockError(
            f"the preset {name} of block_lr_ratios needs {lacks}, the {BASES[lacks]} at which its learning rate was tuned; "
            f"write {example} with yours"
        )
    multiples = {}
    for base in preset.wanted:
        size = BASES[base]
        own = sizes.get(size) or next((known[key] for key in _SPELLINGS[size] if _is_size(known.get(key))), None)
        if own is None:
            raise BlockError(
                f"the preset {name} of block_lr_ratios needs the model's {size}, and no config tells it; make the block map "
                f'from a model with a config, or add "{size}" beside the preset'
            )
        multiples[base] = own / bases[base]
    return multiples


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
