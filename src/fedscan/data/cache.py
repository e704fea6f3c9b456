"""Arrays on disk under the hash of what they were made from: written whole or not at all, checked when opened."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = "entry.json"
Arrays = dict[str, NDArray[Any]]


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no blanks: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def hash_of(path: Path, cache: Path) -> str:
    """The SHA-256 of a file's bytes; from a note in the cache where path, size and time of change are those noted.

    A file that was changed in place, to the same size and within the clock's step, would go unseen. Raises ValueError
    where the file cannot be read.
    """
    note = cache / "sources" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"
    try:
        seen = _seen(path)
        known = _json(note)
        if known.get("seen") == seen:
            return str(known["sha256"])
        digest = _digest(path)
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror}).") from e
    note.parent.mkdir(parents=True, exist_ok=True)
    _replace(note, {"seen": seen, "sha256": digest})
    return digest


def read(entry: Path, verify: bool = False) -> tuple[Arrays, dict[str, Any]] | None:
    """The arrays of an entry as read-only memory maps, and its record; None where it is missing or damaged.

    Damaged is a record that does not match its own hash, or an array that does not match the recorded one. Arrays are
    hashed where size or time of change differ from those recorded, or always with ``verify``.
    """
    record = _json(entry / RECORD)
    check = record.pop("check", None)
    if check is None or check != hashlib.sha256(canonical(record)).hexdigest():
        return None
    arrays, moved = {}, False
    for name, was in record["arrays"].items():
        path = entry / f"{name}.npy"
        try:
            seen = _seen(path)
            if verify or seen != was["seen"]:
                if _digest(path) != was["sha256"]:
                    return None
                moved, was["seen"] = True, seen
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
    if moved:  # a cache that was copied is hashed once, not at every start
        _record(entry, record)
    return arrays, record["note"]


def write(entry: Path, arrays: Mapping[str, NDArray[Any]], note: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Puts an entry in place by one rename, in place of a damaged one, and opens it as ``read`` does.

    Where another process was faster, its entry stays: it was made from the same bytes. Raises OSError where the disk
    is full or not writable.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    old = new.with_name(new.name.replace(".new-", ".old-"))
    try:
        files = {}
        for name, array in arrays.items():
            path = new / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            files[name] = {"seen": _seen(path), "sha256": _digest(path)}
        _record(new, {"arrays": files, "note": dict(note)})
        if read(entry) is None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(entry, old)
            os.rename(new, entry)
    except OSError:
        if read(entry) is None:  # otherwise another process put it there in between
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    found = read(entry)
    if found is None:
        raise OSError(f"{entry} was written but cannot be read back: is the disk sound?")
    return found


def _record(folder: Path, record: Mapping[str, Any]) -> None:
    _replace(folder / RECORD, {**record, "check": hashlib.sha256(canonical(record)).hexdigest()})


def _replace(path: Path, value: Any) -> None:
    """Writes a file of JSON whole or not at all."""
    handle, new = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(canonical(value))
    os.replace(new, path)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _seen(path: Path) -> list[int]:
    """Size in bytes and time of change in ns."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
