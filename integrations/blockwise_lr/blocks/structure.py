"""What a model's modules say of their parameters: their classes, configs, head counts, and what they are.

A name is a convention; a module is what the forward pass runs. Read here is what needs no forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .dims import HeadCounts, config_values, head_counts
from .rules import Rule
from .types import BlockType

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_ATTENTION = re.compile(
    r"Attention(V\d|Subsample|Downsample|PoolLatent|Global)?\Z|Attn\Z|Indexer\Z|MLA\Z|GPSA\Z|MHSA\Z|XCA\Z|AttnConvRelPosEnc\Z|ParallelScalingBlock\Z"
)
# spellings of one number in attention modules; the first that is set is used
_HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "d_head")
_Q_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads", "nhead")
# sizes of the parts of a weight, which may differ between layers; 0 is a size
_SIZES = (
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "key_dim",
    "val_dim",
    "attention_ratio",
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_local_kv_heads")


@dataclass(frozen=True)
class Context:
    """What is stated for the parameters of a module: the naming table, and the head counts."""

    family: str | None
    heads: HeadCounts | None


@dataclass
class Structure:
    """What is known of a model besides names and shapes; without modules only its outermost context.

    Attributes:
        contexts: module name -> context, for modules that state one; "" has the model's.
        classes: module name -> the classes of the modules around its parameters, each followed by a slash.
        transposed: names of weights whose output axis is the last one (Conv1D of transformers).
        known: parameter name -> the rule that its module's nature makes.
    """

    contexts: Mapping[str, Context]
    classes: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    known: Mapping[str, Rule] = field(default_factory=dict)

    def context(self, name: str) -> Context:
        """The context of the innermost enclosing module that has one."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.contexts:
                return self.contexts[name]
        return self.contexts[""]

    def classes_of(self, name: str) -> str:
        """The classes of the modules around a parameter; "" where only its name is known."""
        return self.classes.get(name.rpartition(".")[0], "")


def read_structure(model: nn.Module, config: Any = None, family: str | None = None) -> Structure:
    """Reads a model's modules.

    Args:
        model: any module, also on the meta device.
        config: where to read head counts; None: each module's own.
        family: the naming table; None: the config's ``model_type``.
    """
    classes: dict[str, str] = {}
    for name, module in model.named_modules():
        outer, _, _ = name.rpartition(".")
        classes[name] = (classes[outer] if name else "") + type(module).__name__ + "/"
    return Structure(
        _contexts(model, config, family),
        classes,
        frozenset(_join(name, "weight") for name, module in model.named_modules() if type(module).__name__ == "Conv1D"),
        dict(_known(model)),
    )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _find_config(model: nn.Module) -> Any:
    """The config of the model, or of the first submodule that has one (wrappers hold the model one level down)."""
    for module in model.modules():
        for attribute in ("config", "model_args"):  # the latter is torchtitan's
            config = getattr(module, attribute, None)
            if config is not None and head_counts(config) is not None:
                return config
    return getattr(model, "config", None)


def _contexts(model: nn.Module, config: Any, family: str | None) -> dict[str, Context]:
    """Module name -> context; a vision tower or an encoder inside a larger model has its own config, and an attention
    module may have its own head counts."""
    outer = config if config is not None else _find_config(model)
    family = family or config_values(outer).get("model_type")
    contexts = {"": Context(family, head_counts(outer))}
    if config is not None:
        return contexts
    known: dict[int, Context] = {id(outer): contexts[""]}
    around: dict[str, Context] = {"": contexts[""]}
    for name, module in model.named_modules():
        context = around[name.rpartition(".")[0]]
        own = getattr(module, "config", None)
        if own is not None and id(own) not in known:
            heads = head_counts(own)
            known[id(own)] = Context(config_values(own).get("model_type", family), heads) if heads else contexts[""]
        if own is not None:
            context = contexts[name] = known[id(own)]
        stated = _own_heads(module, context)
        if stated is not None:
            context = contexts[name] = replace(context, heads=stated)
        around[name] = context
    return contexts


def _own_heads(module: nn.Module, context: Context) -> HeadCounts | None:
    """The head counts that an attention module states, completed by those around it; None if it states none."""
    if not _ATTENTION.search(type(module).__name__) or context.family == "megatron":
        return None
    head_dim, q, kv = (_number(module, names) for names in (_HEAD_DIM, _Q_HEADS, _KV_HEADS))
    around = context.heads
    config = {**(around.config if around is not None else {}), **_own_sizes(module)}
    if (q is None and head_dim is None) or (q is None and around is None):
        return None
    if kv is None and q is not None:
        groups = _number(module, ("num_key_value_groups",))
        kv = q // groups if groups else around.kv if around is not None and around.q == q else q
    if q is None:
        assert around is not None
        return HeadCounts(around.q, kv or around.kv, config, head_dim)
    assert kv is not None
    return HeadCounts(q, kv, config, head_dim)


def _own_sizes(module: nn.Module) -> dict[str, int]:
    return {name: vars(module)[name] for name in _SIZES if isinstance(vars(module).get(name), int)}


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is an integer above 0."""
    for name in names:
        value = vars(module).get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _known(model: nn.Module) -> Iterator[tuple[str, Rule]]:
    """Parameters whose module says what they are, whatever they are called."""
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = _join(prefix, name)
            if isinstance(module, _NORMS) or "Norm" in type(module).__name__:
                # a matrix in a norm's module may be something else (an adaptive norm's modulation)
                yield full, Rule(full, BlockType.NORM, vector=True)
            elif isinstance(module, nn.MultiheadAttention):
                yield full, _packed_attention(full, name)
        if _makes_values_of_keys(module):
            for name, _ in module.k_proj.named_parameters():
                full = _join(prefix, f"k_proj.{name}")
                yield full, Rule(full, BlockType.VO, heads="kv", role="k and v")


_QKV = ("q", "k", "v")


def _packed_attention(full: str, name: str) -> Rule:
    """torch.nn.MultiheadAttention: all q, all k, all v in one weight, or three weights where widths differ; ``bias_k``
    and ``bias_v`` are a further key and value."""
    if name in ("in_proj_weight", "in_proj_bias"):
        return Rule(full, split=_QKV)
    blocks = {"q_proj_weight": "q", "k_proj_weight": "kv", "v_proj_weight": None}
    if name in blocks:
        heads = blocks[name]
        return Rule(full, BlockType.QK if heads else BlockType.VO, heads=heads)
    return Rule(full, BlockType.QK if name == "bias_k" else BlockType.VO, batch_dims=None)


def _makes_values_of_keys(module: nn.Module) -> bool:
    """Whether one projection makes both k and v: such modules have a ``v_proj`` of None (Gemma 4 in transformers)."""
    return isinstance(getattr(module, "k_proj", None), nn.Module) and getattr(module, "v_proj", module) is None
