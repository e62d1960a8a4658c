"""Finding checkpoints in a directory, and the newest complete one."""

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
    """The checkpoints in a directory, by their manifests and file sizes. Incomplete ones are left out.

    Attributes:
        tags: complete checkpoints, newest first; paths relative to the directory.
        damaged: tag -> problem, for checkpoints that were complete once.
        newer: messages of the VersionErrors of checkpoints with a newer format.
        others: complete checkpoints of the other kind (universal or not) than was asked for.
        unknown: folders with DeepSpeed's files but without a manifest, and unreadable folders.
    """

    tags: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    newer: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def scan_checkpoints(directory: str | os.PathLike, *, universal: bool = False) -> Survey:
    """Scans a directory and its subfolders for checkpoints. Read-only.

    Args:
        directory: the ``save_dir`` of ``save_checkpoint``; it need not exist.
        universal: look for universal checkpoints instead of those of ``save_checkpoint``.

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
    """(tag, folder, names in it or None if unreadable) of the directory and all its subfolders, breadth first.

    Symbolic links are followed, each real folder is visited once, and ``zero/`` of universal checkpoints is skipped.
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
        found = names or []
        below = [name for name in found if not (name == "zero" and NAME in found)]
        below.sort(
            key=lambda name: os.path.islink(os.path.join(folder, name))
        )  # visit real folders before links to them
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
        directory, universal: as for :func:`scan_checkpoints`.
        checksums: also read every file and compare its checksum.
        but: tags to exclude.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    left_out = set(but)
    for tag in scan_checkpoints(directory, universal=universal).tags:
        if tag not in left_out and (not checksums or _is_intact(Path(directory) / tag)):
            return tag
    return None


def _is_intact(folder: Path) -> bool:
    manifest = Manifest.read(folder)
    return manifest is not None and not problems(folder, manifest)


def remedy(directory: str | os.PathLike, tag: str, universal: bool = False) -> str:
    """The end of an error message: which checkpoint to load instead of ``tag``."""
    other = newest_complete(directory, but=(tag,), universal=universal)
    return (
        f"the newest complete one beside it is {other!r}; load it with tag={other!r}"
        if other
        else "there is no complete one beside it"
    )


def looks_universal(folder: str | os.PathLike, manifest: Manifest | None) -> bool:
    """Whether a folder is a universal checkpoint, complete or not."""
    return (manifest is not None and manifest.universal) or os.path.isdir(os.path.join(folder, "zero"))


def verify(folder: str | os.PathLike) -> None:
    """Checks every file of a checkpoint folder in this process.

    Raises:
        CheckpointError: it is incomplete, damaged or no checkpoint; the message names the files and the newest complete
            checkpoint beside it.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {NAME}: it was not saved by blockwise_lr, or is no checkpoint folder")
    found = problems(folder, manifest) if manifest.complete else []
    if found or not manifest.complete:
        raise_if_damaged(
            folder, manifest, found, remedy(Path(folder).parent, Path(folder).name, looks_universal(folder, manifest))
        )
