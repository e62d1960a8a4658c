"""The manifest of a checkpoint folder: which files belong to it, with their sizes and checksums.

``blockwise_lr.json`` is written twice: before a save, marked incomplete, and once all ranks' files are on disk, complete.
So a folder that a killed save has left behind is known for what it is, and so are files that were truncated, altered or
exchanged later.
"""
from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DamageError, VersionError
from .record import FORMAT, Record

NAME = "blockwise_lr.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One file: bytes, SHA-256 (None where checksums are switched off) and the rank that wrote it."""

    size: int
    sha256: str | None
    rank: int


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        complete: all files are there.
        steps: optimizer steps done.
        saved_at: nanoseconds since 1970, when the save was completed.
        files: path below the folder -> its entry.
        record: the origin of the optimizer state; None where it is not known.
        layout: how the state was cut over ranks, in its framework's words; None where any layout can load it.
    """

    complete: bool
    steps: int = 0
    saved_at: int = 0
    files: Mapping[str, Entry] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    layout: Mapping[str, Any] | None = None

    @property
    def universal(self) -> bool:
        """Whether the folder is one of DeepSpeed's universal checkpoints."""
        return any(name.startswith("zero/") for name in self.files)

    def write(self, folder: str | os.PathLike) -> None:
        """Replaces the folder's manifest in one step, on disk before it returns."""
        content = {"format": FORMAT, "complete": self.complete, "steps": self.steps, "saved_at": self.saved_at,
                   "files": {name: vars(entry) for name, entry in self.files.items()}, "record": self.record,
                   "layout": self.layout}
        content["sha256"] = _content_hash(content)
        write_atomically(Path(folder) / NAME, json.dumps(content))

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest | None:
        """The folder's manifest, or None where it has none.

        Raises:
            VersionError: it is of a newer format.
            CheckpointError: it is damaged.
        """
        path = Path(folder) / NAME
        try:
            content = json.loads(path.read_text())
            if content["format"] > FORMAT:
                raise VersionError(f"{path} is of format {content['format']}, and this blockwise-lr reads up to "
                                   f"{FORMAT}; install the version that wrote it to load the checkpoint")
            if content.pop("sha256") != _content_hash(content):
                raise ValueError("its checksum does not fit")
            files = {name: Entry(**entry) for name, entry in content["files"].items()}
            return cls(content["complete"], content["steps"], content["saved_at"], files, content["record"],
                       content.get("layout"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged ({error}); load another checkpoint") from error

    def saved_record(self) -> Record | None:
        """The origin of the optimizer state, or None."""
        return None if self.record is None else Record.from_dict(self.record)


def begin(folder: str | os.PathLike) -> None:
    """Marks a folder incomplete before anything is written into it, also where a complete checkpoint lies there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Manifest(complete=False).write(folder)


def entries(folder: str | os.PathLike, paths: Iterable[str | os.PathLike], rank: int,
            checksums: bool = True) -> dict[str, Entry]:
    """The entries of files that this rank has written; on disk (fsync) before it returns.

    Reads every file once, from the page cache as a rule: about one second per GB.
    """
    found = {}
    for path in sorted({os.path.abspath(p) for p in paths}):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        name = os.path.relpath(path, os.path.abspath(folder))
        found[name] = Entry(os.path.getsize(path), _hash(path) if checksums else None, rank)
    return found


def complete(folder: str | os.PathLike, files: Mapping[str, Entry], steps: int,
             record: Mapping[str, Any] | None, layout: Mapping[str, Any] | None = None) -> None:
    """Marks a folder complete. All ranks' files must be on disk."""
    Manifest(True, steps, time.time_ns(), dict(sorted(files.items())), record, layout).write(folder)


def problems(folder: str | os.PathLike, manifest: Manifest, rank: int = 0, ranks: int = 1,
             checksums: bool = True) -> list[str]:
    """What is wrong with a rank's share of a folder's files; an empty list where nothing is.

    Args:
        rank, ranks: this one of so many shares; they are by writer, modulo the number of ranks.
        checksums: compare contents, and not sizes alone.
    """
    found = []
    for name, entry in manifest.files.items():
        if entry.rank % ranks != rank:
            continue
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            found.append(f"{name} is missing")
        elif os.path.getsize(path) != entry.size:
            found.append(f"{name} has {os.path.getsize(path)} bytes and was saved with {entry.size}")
        elif checksums and entry.sha256 is not None and _hash(path) != entry.sha256:
            found.append(f"{name} has other contents than were saved")
    return found


def verify(folder: str | os.PathLike) -> None:
    """Checks every file of a checkpoint folder in this process.

    Raises:
        CheckpointError: it is incomplete or damaged; the message names the files and the newest complete neighbour.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {NAME}: it was not saved by blockwise_lr, or is no checkpoint folder")
    refuse(folder, manifest, problems(folder, manifest))


def refuse(folder: str | os.PathLike, manifest: Manifest, found: list[str]) -> None:
    """Raises CheckpointError where a folder is incomplete, DamageError where it has problems."""
    if manifest.complete and not found:
        return
    universal = manifest.universal or Path(folder, "zero").is_dir()
    other = newest_complete(Path(folder).parent, but=(Path(folder).name,), universal=universal)
    remedy = (f"the newest complete one beside it is {other!r}; load it with tag={other!r}" if other
              else "there is no complete one beside it")
    if not manifest.complete:
        raise CheckpointError(f"checkpoint {folder} is incomplete: the save that wrote it did not finish; {remedy}")
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    raise DamageError(f"checkpoint {folder} is damaged: {'; '.join(found[:4])}{more}; {remedy}", found)


@dataclass(frozen=True)
class Survey:
    """What a directory of checkpoints holds, by manifests and file sizes. Folders of unfinished saves are left out.

    Attributes:
        tags: the complete ones, newest first.
        damaged: tag -> what is wrong, of those that were complete once.
        newer: what VersionError says of those of a newer format.
        others: complete ones that are universal where such were not asked for, and the other way round.
    """

    tags: list[str]
    damaged: dict[str, str]
    newer: list[str]
    others: list[str]


def survey(directory: str | os.PathLike, *, universal: bool = False) -> Survey:
    """Looks at the folders in a directory and changes nothing.

    Args:
        directory: what ``save_checkpoint`` was given.
        universal: look for universal checkpoints and not for those that ``save_checkpoint`` makes.
    """
    found, damaged, newer, others = [], {}, [], []
    for folder in sorted(Path(directory).iterdir()) if Path(directory).is_dir() else ():
        try:
            manifest = Manifest.read(folder) if folder.is_dir() else None
        except VersionError as error:
            newer.append(str(error))
            continue
        except CheckpointError as error:
            damaged[folder.name] = str(error)
            continue
        if manifest is None or not manifest.complete:
            continue
        if manifest.universal != universal:
            others.append(folder.name)
        elif wrong := problems(folder, manifest, checksums=False):
            damaged[folder.name] = "; ".join(wrong)
        else:
            found.append((manifest.saved_at, folder.name))
    return Survey([name for _, name in sorted(found, reverse=True)], damaged, newer, others)


def newest_complete(directory: str | os.PathLike, *, checksums: bool = False, but: Iterable[str] = (),
                    universal: bool = False) -> str | None:
    """The tag of the newest complete checkpoint in a directory, or None.

    Args:
        directory: what ``save_checkpoint`` was given.
        checksums: read every file and compare its contents too.
        but: tags to leave out.
        universal: look for universal checkpoints and not for those that ``save_checkpoint`` makes.
    """
    left_out = set(but)
    for tag in survey(directory, universal=universal).tags:
        folder = Path(directory) / tag
        if tag not in left_out and not (checksums and problems(folder, Manifest.read(folder))):
            return tag
    return None


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all, whenever the process or the machine is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
