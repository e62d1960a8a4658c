"""Which checkpoints a directory holds, and which of them is the newest to go on from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import CheckpointError, VersionError
from .manifest import NAME, Manifest, problems, raise_if_damaged, size_problems


@dataclass
class Survey:
    """What a directory of checkpoints holds, by manifests and file sizes. Folders of unfinished saves are left out.

    Attributes:
        tags: the complete ones, newest first; paths below the directory.
        damaged: tag -> what is wrong, of those that were complete once.
        newer: what VersionError says of those of a newer format.
        others: complete ones that are universal where such were not asked for, and the other way round.
        unknown: folders with DeepSpeed's files and no manifest, or that cannot be read: whether they are complete is
            not known.
    """

    tags: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    newer: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def scan_checkpoints(directory: str | os.PathLike, *, universal: bool = False) -> Survey:
    """Looks at a directory and the folders below it, and changes nothing.

    Args:
        directory: what ``save_checkpoint`` was given.
        universal: look for universal checkpoints and not for those that ``save_checkpoint`` makes.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    found, ages = Survey(), {}
    if not os.path.lexists(directory):
        return found
    for tag, folder, names in _folders(directory):
        if names is None:
            found.unknown.append(tag)
            continue
        try:
            manifest = Manifest.read(folder)
        except VersionError as error:
            found.newer.append(str(error))
            continue
        except CheckpointError as error:
            found.damaged[tag] = str(error)
            continue
        if manifest is None:
            if any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names):
                found.unknown.append(tag)
        elif manifest.complete:
            if manifest.universal != universal:
                found.others.append(tag)
            elif wrong := size_problems(folder, manifest):
                found.damaged[tag] = "; ".join(wrong)
            else:
                ages[tag] = manifest.saved_at
    found.tags = sorted(ages, key=lambda tag: (ages[tag], tag), reverse=True)
    return found


def _folders(directory: str | os.PathLike) -> Iterator[tuple[str, str, list[str] | None]]:
    """(tag, folder, the names in it or None where it cannot be read) of the directory and of all below it, nearest first.

    Links are followed, no folder is shown twice, and what a universal checkpoint holds is not looked into.
    """
    waiting, seen = deque([(".", os.fspath(directory))]), set()
    while waiting:
        tag, folder = waiting.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            if tag == ".":
                raise CheckpointError(f"{folder} cannot be searched for checkpoints ({error.strerror})") from error
            names = None
        yield tag, folder, names
        below = [name for name in names or () if not (name == "zero" and NAME in names)]
        below.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))  # by their own names, not by links'
        waiting.extend(
            (name if tag == "." else f"{tag}/{name}", os.path.join(folder, name))
            for name in below
            if os.path.isdir(os.path.join(folder, name))
        )


def newest_complete(
    directory: str | os.PathLike, *, checksums: bool = False, but: Iterable[str] = (), universal: bool = False
) -> str | None:
    """The tag of the newest complete checkpoint in a directory, or None.

    Args:
        directory: what ``save_checkpoint`` was given.
        checksums: read every file and compare its contents too.
        but: tags to leave out.
        universal: look for universal checkpoints and not for those that ``save_checkpoint`` makes.
    """
    left_out = set(but)
    for tag in scan_checkpoints(directory, universal=universal).tags:
        folder = Path(directory) / tag
        if tag not in left_out and not (checksums and problems(folder, Manifest.read(folder))):
            return tag
    return None


def remedy(directory: str | os.PathLike, tag: str, universal: bool = False) -> str:
    """What to load in place of a checkpoint that cannot be loaded."""
    other = newest_complete(directory, but=(tag,), universal=universal)
    return (
        f"the newest complete one beside it is {other!r}; load it with tag={other!r}"
        if other
        else "there is no complete one beside it"
    )


def looks_universal(folder: str | os.PathLike, manifest: Manifest | None) -> bool:
    """Whether a folder, complete or not, is or was to be a universal checkpoint."""
    return (manifest is not None and manifest.universal) or os.path.isdir(os.path.join(folder, "zero"))


def verify(folder: str | os.PathLike) -> None:
    """Checks every file of a checkpoint folder in this process.

    Raises:
        CheckpointError: it is incomplete or damaged; the message names the files and the newest complete neighbour.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {NAME}: it was not saved by blockwise_lr, or is no checkpoint folder")
    found = problems(folder, manifest) if manifest.complete else []
    if found or not manifest.complete:
        raise_if_damaged(
            folder, manifest, found, remedy(Path(folder).parent, Path(folder).name, looks_universal(folder, manifest))
        )
