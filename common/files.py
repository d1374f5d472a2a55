"""Small files that are either the old bytes or the new ones, and arrays with public facts beside them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import StorageError, UmbelError

_FACTS = "facts"


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Stage beside `path`, fsync, rename, fsync the directory: after this returns the bytes survive a crash.

    Raises:
        StorageError: If the disk fails; `path` is what it was.
    """
    staging = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise StorageError(
            f"Expected to write {path}, got {error.strerror}. Make room or mend the disk, then resume."
        ) from error


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
        facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_FACTS])
        return load(data), facts
    except OSError as error:
        raise UmbelError(f"Expected a file at {path}, got {error.strerror}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UmbelError(f"Expected {path} as umbel wrote it, got something else. Restore or remove it.") from error
