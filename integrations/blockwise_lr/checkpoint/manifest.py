"""The manifest of a checkpoint folder: which files belong to it, with their sizes and checksums.

``blockwise_lr.json`` is written twice: before a save, marked incomplete, and after all ranks' files are on disk, marked
complete. This detects folders of interrupted saves, and files that were truncated, altered or exchanged later.

It protects against accidents (disks, copies, killed runs) and not against attackers: whoever can write the files can
also write a matching manifest, and DeepSpeed unpickles its files, which runs code in them. Only load checkpoints from
sources that you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import CheckpointError, DamageError, VersionError
from .files import flush, make_folder, sha256, write_atomically, xxh3
from .record import Record

NAME = "blockwise_lr.json"
# 1: SHA-256; 2: XXH3, the token of a save, the contents of flat tensors. Incremented when an older version of the
# package could misread a newer manifest.
FORMAT = 2
_TYPED = ConfigDict(strict=True, extra="forbid", frozen=True)


class Entry(BaseModel):
    """One file: its size in bytes, the rank that wrote it, and its checksum (None if checksums are disabled)."""

    model_config = _TYPED

    size: int = Field(ge=0)
    rank: int = Field(ge=0)
    xxh3: str | None = None
    sha256: str | None = None


class Layout(BaseModel):
    """How optimizer state was sharded over ranks.

    Attributes:
        sharding, precision, ranks: in the framework's terms; must be equal for one run to load another's state.
        flats: file with a rank's optimizer state -> digest of the contents of its flat tensors. None in checkpoints of
            older versions; empty if state is kept per parameter.
        order: the parameters' names in the order of the flat tensors, over all ranks.
        settings: the framework's settings that determine that order and the shard boundaries.
    """

    model_config = _TYPED

    sharding: str
    precision: str
    ranks: int | str
    flats: dict[str, str] | None = None
    order: list[str] = []
    settings: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.sharding} in {self.precision} on {self.ranks} data-parallel ranks"

    def same_cut(self, other: Layout) -> bool:
        """Whether both have the same sharding, precision and number of ranks."""
        return str(self) == str(other)


class Manifest(BaseModel):
    """The contents of a checkpoint folder.

    Attributes:
        complete: the save finished and all files were on disk.
        steps: completed optimizer steps.
        saved_at: time of completion in nanoseconds since 1970.
        files: path relative to the folder -> its entry.
        record: the origin of the optimizer state (:class:`Record` as a dict); None: not known.
        layout: how the state was sharded; None if any layout can load it.
        token: a random value of one save, by which ranks verify that they see the same folder.
    """

    model_config = _TYPED

    complete: bool
    steps: int = Field(0, ge=0)
    saved_at: int = Field(0, ge=0)
    files: dict[str, Entry] = {}
    record: dict[str, Any] | None = None
    layout: Layout | None = None
    token: str | None = None

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, Entry]) -> dict[str, Entry]:
        for name in files:
            path = PurePosixPath(name)
            if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
                raise ValueError(f"the file {name!r} does not lie in the folder")
        return files

    @property
    def universal(self) -> bool:
        """Whether the folder is one of DeepSpeed's universal checkpoints."""
        return any(name.startswith("zero/") for name in self.files)

    def write(self, folder: str | os.PathLike) -> None:
        """Writes the folder's manifest, atomically and durably."""
        content = {"format": FORMAT, **self.model_dump(mode="json")}
        content["sha256"] = _content_hash(content)
        write_atomically(Path(folder) / NAME, json.dumps(content))

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest | None:
        """The folder's manifest, or None if it has none.

        Raises:
            VersionError: it has a newer format.
            DamageError: it is damaged or cannot be read.
        """
        path = Path(folder) / NAME
        if not os.path.lexists(path):
            return None
        try:
            if not path.is_file():  # reading a pipe would block
                raise ValueError("it is no file")
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it holds no manifest")
            number = content.pop("format")
            if type(number) is not int:
                raise ValueError(f"its format is {number!r}")
            if number > FORMAT:
                raise VersionError(
                    f"{path} is of format {number}, and this blockwise-lr reads up to {FORMAT}; install "
                    f"the version that wrote it to load the checkpoint"
                )
            if content.pop("sha256") != _content_hash({"format": number, **content}):
                raise ValueError("its checksum does not fit")
            return cls.model_validate(content)
        except VersionError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = _in_words(error)
            raise DamageError(f"{path} is damaged ({what}); load another checkpoint", [f"{NAME}: {what}"]) from error

    def saved_record(self) -> Record | None:
        """The record of the optimizer state's origin, or None."""
        return None if self.record is None else Record.from_dict(self.record)


def _in_words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"no {error} in it" if isinstance(error, KeyError) else f"{error or type(error).__name__}"


def mark_incomplete(folder: str | os.PathLike, token: str | None = None) -> None:
    """Marks a folder incomplete before a save writes to it, even if it holds a complete checkpoint.

    Raises:
        CheckpointError: the folder cannot be created or written to.
    """
    make_folder(folder)
    Manifest(complete=False, token=token).write(folder)


def entry_of(path: str | os.PathLike, rank: int, checksums: bool = True) -> Entry:
    """The entry of a file that this rank has written. Reads the file once and syncs it to disk (fsync)."""
    digest = xxh3(path) if checksums else None  # first, while the pages are in the cache
    flush(path)
    return Entry(size=os.path.getsize(path), rank=rank, xxh3=digest)


def hash_files(
    folder: str | os.PathLike, paths: Iterable[str | os.PathLike], rank: int, checksums: bool = True
) -> dict[str, Entry]:
    """Path relative to the folder -> entry, for files in the folder; see :func:`entry_of`."""
    return {name_in(folder, path): entry_of(path, rank, checksums) for path in sorted(map(os.path.abspath, paths))}


def name_in(folder: str | os.PathLike, path: str | os.PathLike) -> str:
    """A file's path relative to a folder."""
    return os.path.relpath(os.path.abspath(path), os.path.abspath(folder))


def mark_complete(
    folder: str | os.PathLike,
    files: Mapping[str, Entry],
    steps: int,
    record: Mapping[str, Any] | None,
    layout: Layout | None = None,
    patience: float = 0.0,
) -> None:
    """Marks a folder complete, once all files are visible from this rank with their sizes.

    Args:
        folder: the checkpoint folder.
        files: the entries of all ranks' files, all on disk.
        steps, record, layout: as in :class:`Manifest`.
        patience: seconds to wait for files of other nodes on a network file system.

    Raises:
        CheckpointError: a file is missing or has another size, or the manifest cannot be written.
    """
    made = Manifest(
        complete=True,
        steps=steps,
        saved_at=time.time_ns(),
        files=dict(sorted(files.items())),
        record=dict(record) if record is not None else None,
        layout=layout,
    )
    deadline = time.monotonic() + patience
    while lacking := size_problems(folder, made):
        if time.monotonic() >= deadline:
            raise CheckpointError(
                f"in {folder} {'; '.join(lacking[:4])}: the ranks do not share that folder, or "
                f"something else writes to it; save to a file system that all nodes share"
            )
        time.sleep(0.1)
    made.write(folder)


def size_problems(folder: str | os.PathLike, manifest: Manifest) -> list[str]:
    """One sentence per file of the manifest that is missing or has another size."""
    return [found for name, entry in manifest.files.items() if (found := _size_problem(folder, name, entry))]


def _size_problem(folder: str | os.PathLike, name: str, entry: Entry) -> str | None:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return f"{name} is missing"
    size = os.path.getsize(path)
    return f"{name} has {size} bytes and was saved with {entry.size}" if size != entry.size else None


def problems(folder: str | os.PathLike, manifest: Manifest, rank: int = 0, ranks: int = 1) -> list[str]:
    """One sentence per file that is missing or has another size or checksum.

    Args:
        folder: the checkpoint folder.
        manifest: its manifest.
        rank, ranks: check only files written by ranks that are equal to ``rank`` modulo ``ranks``, so that ranks can
            share the work.
    """
    found = []
    for name, entry in manifest.files.items():
        if entry.rank % ranks != rank:
            continue
        if problem := _size_problem(folder, name, entry) or _content_problem(folder, name, entry):
            found.append(problem)
    return found


def _content_problem(folder: str | os.PathLike, name: str, entry: Entry) -> str | None:
    path = os.path.join(folder, name)
    try:
        same = (entry.xxh3 is None or xxh3(path) == entry.xxh3) and (
            entry.sha256 is None or entry.xxh3 is not None or sha256(path) == entry.sha256
        )
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return None if same else f"{name} has other contents than were saved"


def raise_if_damaged(folder: str | os.PathLike, manifest: Manifest, found: list[str], remedy: str) -> None:
    """Raises CheckpointError for an incomplete folder and DamageError for one with problems.

    Args:
        folder: the checkpoint folder.
        manifest: its manifest.
        found: its problems, as returned by :func:`problems` or :func:`size_problems`.
        remedy: the end of the message: what to load instead.
    """
    if not manifest.complete:
        raise CheckpointError(f"checkpoint {folder} is incomplete: the save that wrote it did not finish; {remedy}")
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise DamageError(f"checkpoint {folder} is damaged: {'; '.join(found[:4])}{more}; {remedy}", found)


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
