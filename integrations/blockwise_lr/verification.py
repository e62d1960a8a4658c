"""``blockwise-lr inspect --verify``: the user's model, cut to a few layers and run once, against its map."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .blocks import BlockError, map_blocks
from .inspection import find_factory, load_model
from .probe import Contradiction, contradictions, probe

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
    """

    proven: int
    contradicted: list[Contradiction]


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
    block_map = map_blocks(model, rules=rules, strict=False, family=getattr(model, "blockwise_family", None))
    wrong = contradictions(block_map, uses)
    fed = {name for name, use in uses.items() if name in block_map and bool((use.scores | use.values).any())}
    return Verified(len(fed - {c.parameter for c in wrong}), wrong)


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
