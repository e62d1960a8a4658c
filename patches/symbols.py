"""Names of what belongs to another project, and whether the installed version has them as they are expected.

Nothing here is imported until it is checked, so that declarations can be listed where the project is not installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet

MISSING = object()


class PatchError(RuntimeError):
    """An upstream package is missing, of a version this code was not written for, or of another shape."""


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_in(version: str, versions: str) -> bool:
    """Whether a version lies in a PEP 440 range; pre-releases count."""
    return version in SpecifierSet(versions, prereleases=True)


def has_module(module: str) -> bool:
    """Whether a module is installed. Imports the packages that it lies in."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Symbol:
    """One attribute of a module or class: ``package.module:Class.attribute``.

    Attributes:
        path: where it is, module and qualified name parted by a colon.
        parameters: the parameter names its signature must have, in order; None for what is not a function.
        versions: the versions of the package that have it, where not all do.
        why: what it is needed for.
    """

    path: str
    parameters: tuple[str, ...] | None = None
    versions: str = ""
    why: str = ""

    def owner(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name. Imports the upstream module."""
        module, _, qualified = self.path.partition(":")
        *parents, name = qualified.split(".")
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name

    def is_in(self, version: str | None) -> bool:
        """Whether that version of the package should have it."""
        return not self.versions or (version is not None and is_in(version, self.versions))

    def value(self) -> Any:
        """What the attribute holds now."""
        owner, name = self.owner()
        return getattr(owner, name)

    def problem(self) -> str | None:
        """What is wrong with the symbol in the installed version, in words; None where nothing is."""
        module, _, qualified = self.path.partition(":")
        try:
            value: Any = importlib.import_module(module)
        except Exception as error:  # a module that is gone, or that fails on import for reasons of its own
            needed = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
            if needed and needed.partition(".")[0] != module.partition(".")[0]:  # of another project, and not installed
                return (
                    f"{module} needs {needed}, which is not installed (pip install it), so that it cannot be imported"
                )
            return f"{module} cannot be imported ({type(error).__name__}: {error})"
        names = qualified.split(".")
        for number, name in enumerate(names, 1):
            if not hasattr(value, name):
                return _has_no_more(f"{module}:{'.'.join(names[:number])}")
            value = getattr(value, name)
        if self.parameters is None:
            return None
        found = tuple(inspect.signature(value).parameters)
        return None if found == self.parameters else f"{self.path} takes {found} where {self.parameters} was expected"


@dataclass(frozen=True)
class Attributes:
    """Attributes that a class sets on its instances, and that only an instance can be checked for.

    Attributes:
        of: the class, as ``package.module:Class``.
        names: the attributes.
        versions, why: as of Symbol.
    """

    of: str
    names: tuple[str, ...]
    versions: str = ""
    why: str = ""

    def is_in(self, version: str | None) -> bool:
        """Whether that version of the package should have them."""
        return not self.versions or (version is not None and is_in(version, self.versions))

    def problem(self, instance: Any) -> str | None:
        """The first attribute that an instance of the class lacks, in words."""
        lacking = next((name for name in self.names if not has_attribute(instance, name)), None)
        return None if lacking is None else _has_no_more(f"{self.of}.{lacking}")

    def is_for(self, instance: Any) -> bool:
        """Whether an object is an instance of the class."""
        return isinstance(instance, Symbol(self.of).value())


def symbols(owner: str, *names: str, why: str = "", versions: str = "") -> tuple[Symbol, ...]:
    """Symbols of one module (``package.module``) or class (``package.module:Class``), signatures not looked at."""
    separator = "." if ":" in owner else ":"
    return tuple(Symbol(f"{owner}{separator}{name}", None, versions, why) for name in names)


def has_attribute(instance: Any, name: str) -> bool:
    """hasattr, but neither runs the properties of a class nor believes its ``__getattr__``: a DeepSpeed engine answers for
    its module, whose attributes may have the same names."""
    held = getattr(instance, "__dict__", {})
    return (
        name in held
        or hasattr(type(instance), name)
        or any(name in held.get(kept, ()) for kept in ("_modules", "_parameters", "_buffers"))  # of torch.nn.Module
    )


def _has_no_more(path: str) -> str:
    owner, _, name = path.replace(":", ".").rpartition(".")
    return f"{owner} has no {name} any more"


@dataclass(kw_only=True)
class Declared:
    """What this code replaces in, or relies on of, one upstream package.

    Attributes:
        name: short and unique, as ``blockwise-lr doctor`` prints it.
        package: the distribution whose version counts, e.g. ``deepspeed``.
        versions: a PEP 440 range it was written and tested for.
        symbols: what is replaced.
        reads: what is relied on besides.
        why: why no official hook does.
        until: what would make it needless.
        needs: a module of the package that not every installation has; without it nothing is checked.
        refused: why versions are left out, by range, as the end of "it is installed, ...".
    """

    name: str
    package: str
    versions: str
    symbols: Sequence[Symbol] = ()
    reads: Sequence[Symbol] = ()
    why: str
    until: str = ""
    needs: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    def installed_version(self) -> str | None:
        """The installed version of the package, or None."""
        return installed_version(self.package)

    def symbols_here(self) -> list[Symbol]:
        """All symbols that the installed version should have."""
        version = self.installed_version()
        return [symbol for symbol in (*self.symbols, *self.reads) if symbol.is_in(version)]

    def version_problem(self) -> str | None:
        """Why the installed package is not one that this was written for; None where it is. Imports nothing."""
        version = self.installed_version()
        if version is None:
            return f"{self.package} is not installed"
        if not is_in(version, self.versions):
            return f"{self.package} {version} is installed, {self._why_not(version)}"
        return None

    def problems(self) -> list[str]:
        """Every symbol that the installed package lacks or has in another form, in words. Changes nothing."""
        return [problem for problem in (symbol.problem() for symbol in self.symbols_here()) if problem is not None]

    def check(self) -> None:
        """Raises PatchError unless the installed package is of the versions and has the symbols that this needs."""
        version = self.installed_version()
        if version is None:
            raise PatchError(f"{self.package} is not installed; {self._install()}")
        if not is_in(version, self.versions):
            raise PatchError(
                f"{self.package} {version} is installed, {self._why_not(version)}; {self._install()}, or a newer blockwise-lr"
            )
        self.refuse(symbol.problem() for symbol in self.symbols_here())

    def _why_not(self, version: str) -> str:
        known = (why for versions, why in self.refused.items() if is_in(version, versions))
        return next(known, f"which {self.name!r} was not written for")

    def _install(self) -> str:
        return f'pip install "{self.package}{self.versions}"'

    def refuse(self, problems: Iterable[str | None]) -> None:
        """Raises PatchError with the first problem there is."""
        problem = next((problem for problem in problems if problem is not None), None)
        if problem is not None:
            raise PatchError(
                f"{problem} ({self.package} {self.installed_version()} is installed), and {self.name!r} relies on "
                f"it; install an unchanged {self.package}{self.versions}, or a newer blockwise-lr"
            )
