"""Runtime patches: what they replace in another project, for which versions, and how it is given back.

A patch touches another project's code, so it has to be careful in the same way everywhere: refuse a version it was not
written for, refuse a symbol whose signature has changed, do nothing the second time, and give everything back on undo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .symbols import MISSING, Declared, PatchError

Hooks = TypeVar("Hooks")


class Undo:
    """Attributes a patch has set, with what stood there before; undone in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets ``owner.name`` and remembers what it was (an inherited or absent attribute is deleted again on undo)."""
        own = vars(owner).get(name, MISSING) if hasattr(owner, "__dict__") else getattr(owner, name, MISSING)
        setattr(owner, name, value)
        self.call(lambda: delattr(owner, name) if own is MISSING else setattr(owner, name, own))

    def call(self, step: Callable[[], None]) -> None:
        """Remembers another way back, for what is not an attribute (a list entry, a mode that was entered)."""
        self._steps.append(step)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


@dataclass(kw_only=True)
class Patch(Declared, Generic[Hooks]):
    """One change to modules and classes of an upstream project, in force for the whole process.

    What it puts in place belongs to its caller, who hands it in: a patch knows upstream and nothing of its caller.

    Attributes:
        install: makes the change with the hooks it is given, registering every step with the given Undo.
        hooks: the type of the hooks; None where the patch needs none.
    """

    install: Callable[[Undo, Hooks], None]
    hooks: type[Hooks] | None = None
    _undo: Undo | None = field(default=None, repr=False)
    _given: Hooks | None = field(default=None, repr=False)

    @property
    def applied(self) -> bool:
        return self._undo is not None

    def apply(self, hooks: Hooks | None = None) -> Callable[[], None]:
        """Checks, changes upstream once, and returns what undoes it. A second call changes nothing more.

        Args:
            hooks: what the patch puts in place; by default what it was given the last time.

        Raises:
            PatchError: the installed package is not one this patch was written for, or the patch is applied with
                other hooks.
        """
        if self._undo is not None:
            if hooks is not None and hooks != self._given:
                raise PatchError(f"patch {self.name!r} is applied with other hooks; undo it first")
            return self.undo
        self.check()
        given = self._given if hooks is None else hooks
        if self.hooks is not None and not isinstance(given, self.hooks):
            raise PatchError(
                f"patch {self.name!r} needs {self.hooks.__module__}.Hooks; it is applied by the adapter that has them, "
                f"so import that first"
            )
        self._undo, self._given = Undo(), given
        try:
            self.install(self._undo, given)  # type: ignore[arg-type]
        except BaseException:
            self.undo()
            raise
        return self.undo

    def undo(self) -> None:
        """Gives upstream back as it was; does nothing when the patch is not applied."""
        if self._undo is not None:
            self._undo()
            self._undo = None
