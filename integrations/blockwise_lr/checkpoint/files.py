"""Files of a checkpoint on disk: checksums, writing that survives a kill, and why a write failed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import xxhash

from .errors import CheckpointError

_CHUNK = 1 << 20  # stays in the cache between reading and hashing
_PROBE = 1 << 20


def xxh3(path: str | os.PathLike) -> str:
    """The file's XXH3 (128 bits, hex), as ``xxhsum -H2`` prints it: several GB a second from the page cache."""
    return _digest(path, xxhash.xxh3_128())


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256, which manifests of format 1 hold."""
    return _digest(path, hashlib.sha256())


def _digest(path: str | os.PathLike, digest: xxhash.xxh3_128 | hashlib._Hash) -> str:
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def flush(path: str | os.PathLike) -> None:
    """Waits until a file, or a directory's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all, whenever the process or the machine is killed.

    Raises:
        CheckpointError: it cannot be written; says why.
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


def make_folder(folder: str | os.PathLike) -> None:
    """Makes a folder and those above it where they are not there.

    Raises:
        CheckpointError: it cannot be made; says why.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {_reason(error, folder)}; {FIX}") from error


FIX = "mend that or save to another folder"


def write_error(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """What to tell of a file that could not be written.

    torch.save reports a full disk as a position in its archive that it did not expect, so the reason is asked for again
    by writing a little more to the file, which is lost anyway.
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
    """The error in words, with the free space of the nearest folder above that is there."""
    what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    place = Path(folder).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    return f"{what} ({free:,} bytes are free on the disk of {place})"
