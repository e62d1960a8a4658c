"""What an adapter reads of its framework without replacing it, declared so that a change upstream stops the start.

Attributes of modules and classes are checked when an adapter is imported, those that objects get when they are built once
such an object is at hand: see :meth:`Upstream.check_instance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .symbols import Attributes, Declared, Symbol


@dataclass(kw_only=True)
class Upstream(Declared):
    """What is read of one package.

    Attributes:
        instances: attributes that objects of its classes get when they are built.
    """

    instances: Sequence[Attributes] = ()

    def instances_here(self) -> list[Attributes]:
        """Those that the installed version should have."""
        version = self.installed_version()
        return [attributes for attributes in self.instances if attributes.is_in(version)]

    def symbols_here(self) -> list[Symbol]:
        """With the classes whose instances are looked at."""
        return [*super().symbols_here(), *(Symbol(attributes.of) for attributes in self.instances_here())]

    def check_instance(self, *instances: Any) -> None:
        """Checks objects for the attributes that are declared of their classes.

        Raises:
            PatchError: one is missing; the sentence names it.
        """
        self.refuse(
            attributes.problem(instance)
            for instance in instances
            for attributes in self.instances_here()
            if attributes.is_for(instance)
        )
