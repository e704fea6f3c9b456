"""A site's disk: what it remembers after each turn, and what it answered. One rename commits a turn.

    key                            the site's own secret, drawn once
    turns/<round>.<call>/          receipt.json, memory.json, and answer.safetensors where the answer is kept
    entries/<sha256>.safetensors   what the memories hold, each entry once, whatever the number of turns that hold it

Memory starts from a turn that the server accepted, never from "the latest", so an answer that was late, refused or
lost leaves no trace in it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedscan import wire
from fedscan.spec import Refused, Spec
from fedscan.wire import Parcel

Base = tuple[int, int] | None  # round and call of the turn whose memory is meant; None before the first
Event = Callable[[str], None]


def nothing(event: str) -> None:
    """Does nothing. Tests put something that kills in its place."""


class Damaged(Exception):
    """A file on a site's disk cannot be read. The text is one sentence: whose, of which round, and what to do."""


@dataclass(frozen=True)
class Receipt:
    """What a site keeps of a turn it answered."""

    asked: str  # SHA-256 of the question's bytes
    answered: str  # SHA-256 of the answer's bytes
    nbytes: int
    seconds: float
    changed: bool  # whether the memory did; if not, this turn keeps none
    question: str = ""  # its name; receipts of older versions have none


def write_secret(file: BinaryIO) -> None:
    """Writes 32 bytes that nobody can guess into a file that nobody else may read."""
    os.fchmod(file.fileno(), 0o600)
    file.write(os.urandom(32))


class SiteDisk:
    """One site's folder. Only one process at a time writes to it."""

    def __init__(self, folder: Path, *, durable: bool = False, event: Event = nothing) -> None:
        self.folder, self.durable, self.event = folder, durable, event
        self._sound: set[str] = set()  # entries that this process wrote, or held to their hash

    @property
    def key(self) -> bytes:
        """32 secret bytes that never leave the site."""
        path = self.folder / "key"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            wire.replace_file(path, write_secret, durable=True)
        key = path.read_bytes()
        if len(key) != 32:
            raise Damaged(f"the key of {self.folder.name} is damaged: restore the file {path} from a copy")
        return key

    def turn(self, base: tuple[int, int]) -> Path:
        return self.folder / "turns" / f"{base[0]}.{base[1]}"

    def recall(self, base: Base) -> dict[str, Any]:
        """The memory as it was after turn ``base``. Raises Damaged where it cannot be read, or a bit has changed."""
        if base is None:
            return {}
        with self._reading("memory", base):
            listing = json.loads((self.turn(base) / "memory.json").read_text())
            memory: dict[str, Any] = dict(listing["plain"])
            for name, digest in listing["entries"].items():
                path = self.folder / "entries" / f"{digest}.safetensors"
                memory[name] = (wire.read_file(path) if digest in self._sound else read_sound(path, digest))["entry"]
                self._sound.add(digest)
            return memory

    def receipt(self, turn: tuple[int, int]) -> Receipt | None:
        """The receipt of a turn whose answer is still here."""
        path = self.turn(turn)
        if not (path / "answer.safetensors").exists():
            return None
        with self._reading("receipt", turn):
            return Receipt(**json.loads((path / "receipt.json").read_text()))

    def answer(self, turn: tuple[int, int]) -> Path:
        """Where the answer of a turn lies."""
        return self.turn(turn) / "answer.safetensors"

    def sound(self, turn: tuple[int, int], receipt: Receipt) -> bool:
        """Whether the answer of a turn is, bit for bit, what its receipt says."""
        return digest_of(self.answer(turn)) == receipt.answered

    @contextmanager
    def _reading(self, what: str, turn: tuple[int, int]) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise Damaged(
                f"the {what} of {self.folder.name} after round {turn[0]} cannot be read ({type(e).__name__}: {e}): "
                f"restore the folder {self.folder} from a copy, or begin a new run"
            ) from e

    def commit(
        self, turn: tuple[int, int], memory: dict[str, Any] | None, receipt: Receipt, answer: Parcel | None
    ) -> None:
        """Keeps a turn: the new memory where it changed, the receipt, and the answer if it may be asked for again."""
        files = {"receipt.json": asdict(receipt)}
        if memory is not None:
            files["memory.json"] = self._entries(turn, memory)
        path = self.turn(turn)
        partial = path.with_name(f".{path.name}.partial")
        drop(partial)
        partial.mkdir(parents=True)
        if answer is not None:
            wire.put_file(partial / "answer.safetensors", answer.write, durable=self.durable)
        for name, content in files.items():
            wire.put_file(partial / name, as_json(content), durable=self.durable)
        self.event(f"site turn written {turn}")
        drop(path)  # a turn that was computed before, and not accepted
        partial.rename(path)
        if self.durable:
            wire.sync_folder(path)
            wire.sync_folder(path.parent)
        self.event(f"site turn kept {turn}")

    def _entries(self, turn: tuple[int, int], memory: dict[str, Any]) -> dict[str, Any]:
        """Writes what a memory holds and no earlier one held; returns what stands where."""
        (self.folder / "entries").mkdir(parents=True, exist_ok=True)
        listing: dict[str, Any] = {"plain": {}, "entries": {}}
        for name, value in memory.items():
            parcel = wire.pack({"entry": value})
            if not parcel.leaves and not isinstance(value, dict):
                listing["plain"][name] = value
                continue
            listing["entries"][name] = parcel.digest
            path = self.folder / "entries" / f"{parcel.digest}.safetensors"
            if not path.exists():
                wire.write_file(path, parcel, durable=self.durable)
                self._sound.add(parcel.digest)
                self.event(f"site memory written {turn}")
        return listing

    def settle(self, keep: Iterable[Base]) -> None:
        """Drops every turn but those to keep, and the entries that no remaining memory holds."""
        kept = {self.turn(base).name: base for base in keep if base is not None}
        turns = self.folder / "turns"
        if not turns.exists():
            return
        used = set()
        for path in turns.iterdir():
            if path.name not in kept:
                drop(path)
                continue
            with self._reading("memory", kept[path.name]):
                if json.loads((path / "receipt.json").read_text())["changed"]:
                    used |= set(json.loads((path / "memory.json").read_text())["entries"].values())
        self.event("site turns dropped")
        self._sound &= used
        for path in (self.folder / "entries").glob("*"):
            if path.name.removesuffix(".safetensors") not in used:
                path.unlink(missing_ok=True)


def read_sound(path: Path, digest: str, spec: Spec | None = None) -> dict[str, Any]:
    """The message in a file that was written under the SHA-256 ``digest``. Raises Refused where it has another."""
    message = wire.read_file(path, spec)  # first, because it says where a file that was cut short ends
    if digest_of(path) != digest:
        raise Refused(f"{path.name} has changed since it was written")
    return message


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(content: Any) -> Callable[[BinaryIO], object]:
    """What writes this content as JSON."""
    text = wire.dumps(content).encode()
    return lambda file: file.write(text)


def drop(folder: Path) -> None:
    """Removes a turn's folder and the files in it, where it is there."""
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
