"""Messages as they come to a site: in parts, and without the weights that the site has from the message before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedscan import wire
from fedscan.heap import give_back
from fedscan.spec import Refused, Spec
from fedscan.wire import Buffer, Parcel, Pieces

LARGE = 64 << 20  # bytes of a message that is worth some care for the memory that it takes
HELD = 2  # messages whose weights may be spoken of by their hash
LACKS, PARTS = "lacks", "parts"  # why there is no message yet: weights that are not held here; parts still to come


class Incoming:
    """The messages of one run at one site. ``most`` is how many bytes one may have."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._held: list[tuple[str, dict[str, Any], dict[str, Parcel]]] = []  # the last messages, and their blobs

    def put(self, payload: str, at: int, total: int, data: memoryview) -> int:
        """Adds a part of a payload (named by its SHA-256) where it goes on; returns how many bytes there are now.

        Whether they are what they should be is seen where a message is made of them.
        """
        path = self._file(payload)
        if not 0 <= at <= total <= self.most or at + len(data) > total:
            raise Refused(f"a part at byte {at} of a message of {total} bytes; at most {self.most} are taken here")
        have = self.have(payload)
        if at != have or have == total:
            return have  # a part that came before, or too early
        self.folder.mkdir(exist_ok=True)
        if have == 0:
            self.drop()  # what else began to come is not waited for any more
        with path.open("ab") as file:
            file.write(data)
        return have + len(data)

    def have(self, payload: str) -> int:
        """How many bytes of a payload have come in parts."""
        path = self._file(payload)
        return path.stat().st_size if path.exists() else 0

    def _file(self, payload: str) -> Path:
        if len(payload) != 64 or set(payload) - set("0123456789abcdef"):
            raise Refused("a payload is named by 64 hexadecimal digits")
        return self.folder / payload

    def message(self, header: Mapping[str, Any], body: memoryview, takes: Spec | None = None) -> dict[str, Any] | str:
        """The message that a question comes with, whole, or what is missing: ``LACKS`` or ``PARTS``.

        What it ``takes`` says how much the message may announce.

        ``header`` has ``asked`` (the message's SHA-256), ``nbytes``, ``payload`` (the SHA-256 of what travels of it),
        ``travels`` (its bytes) and ``recipe`` (what goes where: bytes of the payload, or a hash and its bytes).
        """
        match header:
            case {"asked": str(asked), "nbytes": int(size), "payload": str(name), "travels": int(travels),
                  "recipe": [*recipe]} if 0 <= travels <= size <= self.most:  # fmt: skip
                pass
            case _:
                raise Refused(f"a question whose message is not described, or has more than {self.most} bytes")
        for known, message, _ in self._held:
            if known == asked:
                return message
        if any(isinstance(step, str) and self._blob(step) is None for step in recipe):
            return LACKS
        payload = np.asarray(body) if len(body) == travels else self._arrived(name, travels)
        if payload is None:
            return PARTS
        if size >= LARGE:  # while it is held to its hash and answered, those before need not lie in memory too
            for _, before, _ in self._held:
                give_back(wire.pack(before).leaves)
        data = self._made(recipe, payload) if recipe else Pieces([payload])
        if len(data) != size or data.digest != asked:
            if len(body) != travels and self.have(name):
                self.drop()  # the disk did not keep what came in parts: it is needed again
                return PARTS
            raise Refused("a message is not what its digest says")
        message = wire.unpack(data, takes)
        self._held = [(asked, message, {}), *self._held][:HELD]
        return message

    def _arrived(self, payload: str, travels: int) -> Buffer | None:
        """The bytes of a payload that came in parts, mapped; None where some are missing."""
        path = self._file(payload)
        return np.memmap(path, np.uint8, mode="c") if path.exists() and path.stat().st_size == travels else None

    def _made(self, recipe: list[Any], payload: Buffer) -> Pieces:
        """A message put together from its payload and from what is held here."""
        pieces: list[Buffer] = []
        taken = 0
        for step in recipe:
            match step:
                case int(length) if 0 <= length <= len(payload) - taken:
                    pieces.append(payload[taken : taken + length])
                    taken += length
                case str(blob) if parcel := self._blob(blob):
                    pieces.extend(np.asarray(chunk) for chunk in parcel.chunks() if isinstance(chunk, memoryview))
                case _:
                    raise Refused("a recipe of a message that is none")
        return Pieces(pieces)

    def _blob(self, digest: str) -> Parcel | None:
        """The weights, or the tensor, with this SHA-256, of one of the last messages."""
        for _, message, blobs in self._held:
            if not blobs:
                whole = wire.pack(message)
                parts = (Parcel(b"", whole.leaves[begin:end]) for begin, end in whole.runs)
                blobs |= {part.digest: part for part in parts if part.nbytes >= wire.BLOB_BYTES}
            if digest in blobs:
                return blobs[digest]
        return None

    def drop(self) -> None:
        """Removes what came in parts; what is still in use stays mapped."""
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)
