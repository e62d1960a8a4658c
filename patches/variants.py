"""What differs between the versions of a package: one way per range, side by side.

Ranges decide, and not what happens to be there: where a version of a range lacks what its way needs, that is drift, which
the declarations refuse by name, and never a reason to try another way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from .symbols import PatchError, installed_version, is_in

Way = TypeVar("Way")


@dataclass(frozen=True)
class Variants(Generic[Way]):
    """The ways of doing one thing, of which each version of a package has one.

    Attributes:
        package: the distribution whose version counts.
        ways: PEP 440 range -> way. Every version that was read lies in exactly one of them.
    """

    package: str
    ways: Mapping[str, Way]

    def of(self, version: str | None) -> Way:
        """The way of a version.

        Raises:
            PatchError: no range holds it; the sentence names them.
        """
        for versions, way in self.ways.items():
            if version is not None and is_in(version, versions):
                return way
        raise PatchError(
            f"{self.package} {version} is installed, and only {' and '.join(self.ways)} are known here; install a version "
            f"that `blockwise-lr doctor` names, or a newer blockwise-lr"
        )

    @functools.cached_property
    def here(self) -> Way:
        """The way of the installed version; looked up once a process."""
        return self.of(installed_version(self.package))
