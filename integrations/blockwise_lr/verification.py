"""``blockwise-lr inspect --verify``: the user's model, cut to a few layers and run once, against its map."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .blocks import BlockError, BlockMap, map_blocks
from .blocks.globs import matches
from .inspection import find_factory, load_model
from .probe import Contradiction, Use, contradictions, probe

_LAYERS, _TOKENS, _VOCABULARY = 2, 8, 512
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_NEEDS = "--verify runs the model, which needs a Hugging Face config or package.module:factory"
_WIDTHS = ("vocab_size",)  # a table's rows are all alike


@dataclass(frozen=True)
class Verified:
    """What the forward pass says of a map.

    Attributes:
        proven: parameters that feed the scores or the values of an attention, as the map says.
        contradicted: those that feed what the map does not say.
        proposed: block rules for parameters that no rule maps, by what their rows feed; some may be missing.
    """

    proven: int
    contradicted: list[Contradiction]
    proposed: list[dict[str, Any]]


def verify(target: str, *, rules: Iterable[dict] | None = None) -> Verified:
    """Runs a target's model once on the CPU, with random weights, and compares its map with what feeds what.

    Args:
        target: a Hugging Face config or ``package.module:factory``, as for ``inspect``. Of a config's model the first
            layers are built, up to the first one of full attention.
        rules: the optimizers' block_rules.

    Raises:
        BlockError: the target is a Megatron argument file, or no attention is seen in the forward pass.
    """
    torch.manual_seed(0)
    model = _real(target).eval()
    with torch.no_grad():
        for p in model.parameters():  # a scale that starts at 0 would hide what it scales
            p.normal_(0, 0.05) if p.dim() > 1 else p.normal_(1, 0.1)
    uses = _seen(model)
    family = getattr(model, "blockwise_family", None)
    block_map = map_blocks(
        model, rules=rules, strict=False, family=family, elsewhere=()
    )  # rules may be of layers cut off
    wrong = contradictions(block_map, uses)
    fed = {name for name, use in uses.items() if name in block_map and bool((use.scores | use.values).any())}
    proven = fed - {c.parameter for c in wrong} - block_map.unmapped
    return Verified(len(proven), wrong, _proposed(block_map, uses))


def _proposed(block_map: BlockMap, uses: Mapping[str, Use]) -> list[dict[str, Any]]:
    """Rules for what no rule maps, once for all layers where that reaches nothing else."""
    found: dict[str, dict[str, Any]] = {}
    for name in block_map:
        rule = proposed_rule(name, uses[name]) if name in block_map.unmapped and name in uses else None
        if rule is not None:
            glob = ".".join("*" if part.isdigit() else part for part in name.split("."))
            if all(other in block_map.unmapped for other in block_map if matches(glob, other)):
                rule["match"] = glob
            found[json.dumps(rule)] = rule
    return list(found.values())


def proposed_rule(name: str, use: Use) -> dict[str, Any] | None:
    """The block rule that says of a parameter what its output units feed; None where they feed no attention, or in no
    pattern that a rule can say.

    Args:
        name: the parameter's.
        use: from :func:`~blockwise_lr.probe.probe` on real tensors.
    """
    for transposed in (False, True) if use.scores.dim() == 2 else (False,):
        axis = 0 if transposed else 1
        flags = [f.any(axis) if f.dim() == 2 else f.reshape(len(f), -1).any(1) for f in (use.scores, use.values)]
        if not bool((flags[0] | flags[1]).any()):
            return None
        feeds = ["vo" if value or not score else "qk" for score, value in zip(*(f.tolist() for f in flags))]
        both = bool((flags[0] & flags[1]).all())  # along the other axis every unit feeds everything, or it is a latent
        if both and not transposed and use.scores.dim() == 2:
            continue
        more = {"transposed": True} if transposed and not both else {}
        if len(set(feeds)) == 1:
            return {"match": name, "block": feeds[0], **more}
        split, repeats = _pattern(feeds)
        often = {"interleave": repeats} if repeats > 1 else {}
        return {"match": name, "split": split, **often, **more} if split else None
    return None


def _pattern(feeds: list[str]) -> tuple[dict[str, int], int]:
    """The shortest pattern that units repeat, as the shares of its roles; empty where it has more parts than roles."""
    count = len(feeds)
    period = next(p for p in range(1, count + 1) if count % p == 0 and feeds == feeds[:p] * (count // p))
    runs = [(block, len(list(same))) for block, same in itertools.groupby(feeds[:period])]
    roles = {"qk": iter(("q", "k")), "vo": iter(("v", "gate"))}
    names = [next(roles[block], None) for block, _ in runs]
    if None in names:
        return {}, 1
    whole = math.gcd(*(size for _, size in runs))
    return {str(name): size // whole for name, (_, size) in zip(names, runs)}, count // period


def _real(target: str) -> torch.nn.Module:
    if ":" in target and not os.path.exists(target):
        return find_factory(target)()
    if os.path.isfile(target) and not target.endswith(".json"):
        raise BlockError(_NEEDS)
    model = load_model(target)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise BlockError(_NEEDS)
    return type(model)(cut_config(config))


def cut_config(config: Any) -> Any:
    """A copy of a Hugging Face config with its first layers only, up to the first of full attention, and a small table."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        kinds = getattr(part, "layer_types", None) or []
        depth = max(_LAYERS, kinds.index("full_attention") + 1 if "full_attention" in kinds else 0)
        before = {n: getattr(part, n) for n in _DEPTHS if isinstance(getattr(part, n, None), int)}
        for name, value in list(vars(part).items()):  # one entry a layer
            if isinstance(value, list) and len(value) in before.values():
                setattr(part, name, value[:depth])
        for name, value in before.items():
            setattr(part, name, min(value, depth))
        for name in _WIDTHS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(getattr(part, name), _VOCABULARY))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(getattr(part, name, None), int) and getattr(part, name) >= _VOCABULARY:
                setattr(part, name, None)
    return config


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _parts(value)


def _seen(model: torch.nn.Module) -> dict[str, Any]:
    """What the probe sees with the inputs under which the model gets to most of its attention."""
    failure: BlockError | None = None
    best: dict[str, Any] = {}
    for inputs in _inputs(model):  # an encoder and a decoder need more inputs than either
        try:
            uses = probe(model, partial(model, **inputs) if isinstance(inputs, dict) else partial(model, inputs))
        except BlockError as error:
            failure = failure or error
        else:
            best = max(best, uses, key=len)
    if not best:
        raise BlockError(f"--verify cannot run this model by itself: {failure}; see blockwise_lr.probe.probe")
    return best


def _inputs(model: torch.nn.Module) -> Iterator[Any]:
    ids = torch.arange(1, _TOKENS + 1)[None]
    yield {"input_ids": ids, "use_cache": False}
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": ids}
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        yield {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), size, size)}
    yield {"input_values": torch.randn(1, 4000)}
    yield ids
