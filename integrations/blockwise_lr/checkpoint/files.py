"""Checkpoint files on disk: checksums, atomic writes, and the reasons of failed writes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from .errors import CheckpointError

_CHUNK = 1 << 20  # stays in the cache between reading and hashing
_PROBE = 1 << 20


def xxh3(path: str | os.PathLike) -> str:
    """The file's XXH3 hash (128 bits, hex), as ``xxhsum -H2`` prints it; several GB/s from the page cache."""
    return _digest(path, xxhash.xxh3_128())


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256 (hex), the checksum of manifests of format 1."""
    return _digest(path, hashlib.sha256())


def _digest(path: str | os.PathLike, digest: xxhash.xxh3_128 | hashlib._Hash) -> str:
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def flush(path: str | os.PathLike) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file atomically and durably (temporary file, fsync, rename, fsync of the folder).

    Raises:
        CheckpointError: it cannot be written; the message says why.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def is_seen(looks: Callable[[], bool], patience: float) -> bool:
    """Whether a look finds what another node has written, on a file system that shows new files after a while or, at first,
    half-way.

    Args:
        looks: for it; a CheckpointError is as good as not finding it.
        patience: seconds to go on looking.
    """
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(CheckpointError):
            if looks():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def make_folder(folder: str | os.PathLike) -> None:
    """Creates a folder and its parents if they do not exist.

    Raises:
        CheckpointError: it cannot be created; the message says why.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {_reason(error, folder)}; {FIX}") from error


FIX = "mend that or save to another folder"


def write_error(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """The error to raise for a file that could not be written.

    torch.save reports a full disk as an unexpected position in its archive, so the cause is found by writing again to
    the file, which is unusable anyway.

    Args:
        path: the file.
        error: the exception of the write.
    """
    if not isinstance(error, (OSError, RuntimeError)):  # something that does not pickle
        return CheckpointError(
            f"cannot write {path}: {type(error).__name__}: {error}; look for what client_state or "
            f"the module's state_dict adds to the checkpoint"
        )
    found = error if isinstance(error, OSError) and error.errno else _tried_again(path) or error
    return CheckpointError(f"cannot write {path}: {_reason(found, Path(path).parent)}; {FIX}")


def _tried_again(path: str | os.PathLike) -> OSError | None:
    was_there = os.path.lexists(path)
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            written = file.write(bytes(_PROBE))
            if written < _PROBE:  # the rest does not fit: this raises
                file.write(bytes(_PROBE))
            os.fsync(file.fileno())
            file.truncate(size)
    except OSError as error:
        return error
    finally:
        if not was_there and os.path.lexists(path):
            os.unlink(path)
    return None


def _reason(error: Exception, folder: str | os.PathLike) -> str:
    """The error's text, with the free space on the disk of the nearest existing parent folder."""
    what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    return f"{what} ({free:,} bytes are free on the disk of {place})"
