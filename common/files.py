"""Small files that are either the old bytes or the new ones, and arrays with public facts beside them."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import StorageError, UmbelError

_FACTS = "facts"
_STAGING = ".tmp"
_REMEDIES = dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST), "Choose a place that can be written to."
)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the file system raises into a `StorageError` that names `path` and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Make room or mend the disk, then resume.")
        raise StorageError(f"Expected to write {path}, got {error.strerror}. {remedy}") from error


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Stage beside `path`, fsync, rename, fsync the directory: after this returns the bytes survive a crash.

    Args:
        path: The file.
        data: All of its bytes.
        mode: Of a new file, before the umask.

    Raises:
        StorageError: If the disk fails; `path` is what it was.
    """
    staging = path.with_name(f".{path.name}{_STAGING}")
    with storing(path):
        try:
            staging.unlink(missing_ok=True)  # what is there already may be a link, or readable by others
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, path)
            sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                staging.unlink()
            raise


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file and fsync it.

    Raises:
        StorageError: If the disk fails; `path` holds whole lines still, with or without this one.
    """
    with storing(path), path.open("ab", buffering=0) as file:
        length = file.tell()
        rest = line + b"\n"
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(length)
            raise


def clear_leftovers(folder: Path) -> None:
    """Remove what a crash left staged in `folder`.

    Raises:
        StorageError: If the disk fails.
    """
    with storing(folder):
        for staging in folder.glob(f".*{_STAGING}"):
            staging.unlink(missing_ok=True)


def cut_torn_line(path: Path) -> None:
    """Cut off what a crash left of a last line.

    Raises:
        StorageError: If the disk fails.
    """
    with storing(path):
        if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Make a folder where there is none, and those above it, so that they survive a crash.

    Raises:
        UmbelError: If a file has the name.
        StorageError: If it cannot be made.
    """
    for place in (path, *path.parents):
        if place.is_file():
            raise UmbelError(f"Expected a folder, got the file {place}. Choose another place.")
    with storing(path):
        for folder in reversed([entry for entry in (path, *path.parents) if not entry.exists()]):
            folder.mkdir(mode=mode if folder == path else 0o777, exist_ok=True)
            sync_directory(folder.parent)


def pack(arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file with `facts` as JSON in its metadata; equal inputs give equal bytes."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    return bytes(save(contiguous, {_FACTS: json.dumps(dict(facts), sort_keys=True)}))


def unpack(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Inverse of `pack`, from a file.

    Raises:
        UmbelError: If the file is missing or is not one of ours.
    """
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        facts = dict(json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_FACTS]))
        return load(data), facts
    except OSError as error:
        raise UmbelError(f"Expected a file at {path}, got {error.strerror}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UmbelError(f"Expected {path} as umbel wrote it, got something else. Restore or remove it.") from error


def sync_directory(path: Path) -> None:
    """Bring a folder's own entries to disk, so that a file made or renamed in it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
