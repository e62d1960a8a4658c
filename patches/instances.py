"""Methods replaced on single objects of an upstream project (an engine, an optimizer), and given back there.

A change to one object must not reach others: a process may have several engines, with and without an optimizer of ours.
What was there before is kept on the object itself, so that it goes when the object does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .symbols import MISSING, Attributes, Declared, PatchError, has_attribute

_KEPT = "_blockwise_lr_patches"


@dataclass(kw_only=True)
class InstancePatch(Declared):
    """One change to single objects.

    Attributes:
        symbols: methods of their classes, which are replaced on an object alone.
        sets: attributes that only an instance has, which are replaced too.
    """

    sets: Sequence[Attributes] = ()

    def apply(self, instance: Any, **replacements: Any) -> None:
        """Replaces methods of an object. Where that is done already it changes nothing.

        What upstream has set anew in the meantime (DeepSpeed links its parameters' methods again after a load) is
        replaced again.

        Args:
            replacements: by the methods' names, which are among the ``symbols``'.

        Raises:
            PatchError: the object has no such method, or it is none that this patch declares.
        """
        self._check_names(instance, replacements)
        if self.applied_to(instance):
            return
        kept = vars(instance).setdefault(_KEPT, {})
        kept.pop(self.name, None)  # comes last now
        kept[self.name] = {
            name: (vars(instance).get(name, MISSING), replacement) for name, replacement in replacements.items()
        }
        for name, replacement in replacements.items():
            setattr(instance, name, replacement)

    def applied_to(self, instance: Any) -> bool:
        """Whether this patch's methods stand on an object now, or lie below those of a later patch."""
        kept = vars(instance).get(_KEPT, {})
        if self.name not in kept:
            return False
        later = {name for patch in list(kept)[list(kept).index(self.name) + 1 :] for name in kept[patch]}
        return all(
            name in later or vars(instance).get(name) is replacement
            for name, (_, replacement) in kept[self.name].items()
        )

    def undo(self, instance: Any) -> None:
        """Gives an object its methods back; does nothing where they have not been replaced.

        Raises:
            PatchError: a patch that was applied later holds one of the methods; undo that one first.
        """
        kept = vars(instance).get(_KEPT, {})
        if self.name not in kept:
            return
        for later in reversed(list(kept)):
            if later == self.name:
                break
            if kept[later].keys() & kept[self.name].keys():
                raise PatchError(f"patch {later!r} was applied on top of {self.name!r}; undo it first")
        _put_back(instance, kept.pop(self.name))

    @contextlib.contextmanager
    def during(self, instance: Any, **replacements: Any) -> Iterator[None]:
        """Replaces methods of an object for a while."""
        self.apply(instance, **replacements)
        try:
            yield
        finally:
            self.undo(instance)

    def _check_names(self, instance: Any, replacements: dict[str, Any]) -> None:
        declared = {symbol.path.rpartition(".")[2] for symbol in self.symbols}
        declared.update(name for attributes in self.sets for name in attributes.names)
        for name in replacements:
            if name not in declared:
                raise PatchError(f"patch {self.name!r} does not declare {name}; add it to its symbols")
        self.refuse(
            None
            if has_attribute(instance, name)
            else f"{type(instance).__module__}.{type(instance).__qualname__} has no {name} any more"
            for name in replacements
        )


def instance_patches_on(instance: Any) -> tuple[str, ...]:
    """The names of the patches on an object, in the order in which they were applied."""
    return tuple(getattr(instance, "__dict__", {}).get(_KEPT, ()))


def undo_instance(instance: Any) -> None:
    """Takes every InstancePatch off an object, the last one first."""
    kept = getattr(instance, "__dict__", {}).pop(_KEPT, {})
    for name in reversed(list(kept)):
        _put_back(instance, kept[name])


def _put_back(instance: Any, kept: dict[str, tuple[Any, Any]]) -> None:
    """Gives methods back; one that upstream has replaced since then stays upstream's."""
    for name, (before, replacement) in kept.items():
        if vars(instance).get(name) is not replacement:
            continue
        if before is MISSING:
            delattr(instance, name)
        else:
            setattr(instance, name, before)
