"""What a runtime patch is: which upstream symbols it changes, for which versions, and how it is undone.

A patch touches another project's code, so it has to be careful in the same way everywhere: refuse a version it was not
written for, refuse a symbol whose signature has changed, do nothing the second time, and give everything back on undo.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet

_MISSING = object()


class PatchError(RuntimeError):
    """An upstream package is missing, of a version a patch was not written for, or of another shape."""


@dataclass(frozen=True)
class Symbol:
    """One upstream attribute: ``package.module:Class.attribute``.

    Attributes:
        path: where it is, module and qualified name parted by a colon.
        parameters: the parameter names its signature must have, in order; None for what is not a function.
    """

    path: str
    parameters: tuple[str, ...] | None = None

    def owner(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name. Imports the upstream module."""
        module, _, qualified = self.path.partition(":")
        *parents, name = qualified.split(".")
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name

    def check(self, patch: str) -> None:
        """Raises PatchError where the symbol is gone or its parameters are not the expected ones."""
        try:
            owner, name = self.owner()
            value = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise PatchError(
                f"patch {patch!r}: {self.path} does not exist in the installed version ({error}); "
                f"install a version the patch was written for (see `blockwise-lr doctor`)"
            ) from error
        if self.parameters is None:
            return
        found = tuple(inspect.signature(value).parameters)
        if found != self.parameters:
            raise PatchError(
                f"patch {patch!r}: {self.path} takes {found} where {self.parameters} was expected; "
                f"install a version the patch was written for (see `blockwise-lr doctor`)"
            )


class Undo:
    """Attributes a patch has set, with what stood there before; undone in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets ``owner.name`` and remembers what it was (an inherited or absent attribute is deleted again on undo)."""
        own = vars(owner).get(name, _MISSING) if hasattr(owner, "__dict__") else getattr(owner, name, _MISSING)
        setattr(owner, name, value)
        self.call(lambda: delattr(owner, name) if own is _MISSING else setattr(owner, name, own))

    def call(self, step: Callable[[], None]) -> None:
        """Remembers another way back, for what is not an attribute (a list entry, a mode that was entered)."""
        self._steps.append(step)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


@dataclass
class Patch:
    """One change to one upstream project.

    Attributes:
        name: short and unique, as ``blockwise-lr doctor`` prints it.
        package: the distribution whose version counts, e.g. ``deepspeed``.
        versions: a PEP 440 range it was written and tested for.
        symbols: what it changes or relies on.
        why: why no official hook does.
        until: what would replace it upstream.
        install: makes the change, registering every step with the given Undo.
    """

    name: str
    package: str
    versions: str
    symbols: Sequence[Symbol]
    why: str
    until: str
    install: Callable[[Undo], None]
    _undo: Undo | None = field(default=None, repr=False)

    @property
    def applied(self) -> bool:
        return self._undo is not None

    def installed_version(self) -> str | None:
        """The installed version of the package, or None."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def check(self) -> None:
        """Raises PatchError unless the installed package is one this patch was written for."""
        version = self.installed_version()
        if version is None:
            raise PatchError(
                f"patch {self.name!r} needs {self.package}, which is not installed; "
                f"install {self.package}{self.versions}"
            )
        if version not in SpecifierSet(self.versions, prereleases=True):
            raise PatchError(
                f"patch {self.name!r} was written for {self.package} {self.versions}, and {version} is "
                f"installed; install a version of that range or a newer blockwise-lr"
            )
        for symbol in self.symbols:
            symbol.check(self.name)

    def apply(self) -> Callable[[], None]:
        """Checks, changes upstream once, and returns what undoes it. A second call changes nothing more."""
        if self._undo is None:
            self.check()
            self._undo = Undo()  # before install, whose imports may ask for this patch again
            try:
                self.install(self._undo)
            except BaseException:
                self.undo()
                raise
        return self.undo

    def undo(self) -> None:
        """Gives upstream back as it was; does nothing when the patch is not applied."""
        if self._undo is not None:
            self._undo()
            self._undo = None
