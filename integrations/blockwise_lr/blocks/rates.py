"""The rates that the user's rules give: the first rule that says one, apart from what the parameters are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from .depth import Depths
from .layout import ParamLayout
from .names import plain_names
from .rules import Rule
from .types import BlockError


def applies(rule: Rule, name: str, shape: tuple[int, ...], depths: Depths | None) -> bool:
    """Whether a user's rule is about a parameter, by its name with and without wrappers, and by its layer."""
    names = plain_names(name)
    if not any(rule.matches(one, shape) for one in names):
        return False
    return rule.layers is None or (depths is not None and rule.layers.hold(depths.place(names[0])))


def needs_depths(rules: Iterable[Rule]) -> bool:
    """Whether some rule depends on the layer of a parameter."""
    return any(rule.layers is not None or (rule.rate is not None and rule.rate.layer_decay) for rule in rules)


def with_rates(
    layouts: Sequence[ParamLayout],
    aliases: Sequence[Sequence[str]],
    rules: Iterable[Rule],
    copies: Collection[str],
    depths: Depths | None,
    used: set[Rule],
) -> list[ParamLayout]:
    """The layouts with what the rules say of their rates.

    Args:
        layouts: of every parameter.
        aliases: its names.
        rules: the user's, in their order.
        copies: names of one embedding on several pipeline stages, which train at one rate or drift apart.
        depths: of the model; None where no rule asks for them.
        used: takes the rules that say a rate.

    Raises:
        BlockError: layer_decay in a model whose names tell no layers.
    """
    rules = [rule for rule in rules if rule.rate is not None]
    found = []
    for layout, same in zip(layouts, aliases):
        names = list(copies) if not set(copies).isdisjoint(same) else same
        shape = layout.shape
        rule = next((rule for rule in rules if any(applies(rule, name, shape, depths) for name in names)), None)
        if rule is not None:
            used.add(rule)
            layout = _rated(layout, rule, names[0], depths)
        found.append(layout)
    return found


def _rated(layout: ParamLayout, rule: Rule, name: str, depths: Depths | None) -> ParamLayout:
    rate = rule.rate
    assert rate is not None
    scale = rate.scale
    if rate.layer_decay is not None:
        place = None if depths is None else depths.place(plain_names(name)[0], layout.blocks)
        if place is None:
            raise BlockError(
                f"block rule {rule.match!r} has layer_decay, and no numbers in the parameters' names tell which layer is "
                f"which; give rules with lr_scale for parts of the model"
            )
        scale *= rate.layer_decay**place.from_top
    return replace(layout, own=rate.own, lr_scale=scale)
