"""A message on its way to a site: without the weights that the site has, and in parts where it is large."""

import hashlib
from bisect import bisect_right
from collections.abc import Collection
from typing import Any

from fedscan.engines.doors import Data, joined
from fedscan.recorded import Letter
from fedscan.wire import Parcel


class Outgoing:
    """One letter as requests: ``header`` and body of the question, and parts for what is too large for it.

    ``whole`` says whether all of it had to travel, though the site was believed to have some.
    """

    def __init__(self, letter: Letter) -> None:
        self.letter, self.whole = letter, False
        self._lay(letter.known)

    def send_whole(self) -> None:
        """The site has not what it was believed to have: all of it travels, then."""
        self.whole = True
        self._lay(())

    def _lay(self, known: Collection[str]) -> None:
        letter, parcel = self.letter, self.letter.parcel
        recipe, chunks = cut(parcel, known) if known else ([], list(parcel.chunks()))
        self._chunks = [memoryview(chunk).cast("B") for chunk in chunks]
        self._starts = [0]
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + len(chunk))
        self.travels = self._starts[-1]
        self.header: dict[str, Any] = {
            "act": "ask", "turn": [letter.turn.round, letter.turn.call], "question": letter.question,
            "base": letter.base, "asked": parcel.digest, "nbytes": parcel.nbytes, "recipe": recipe,
            "payload": self._digest() if recipe else parcel.digest, "travels": self.travels,
        }  # fmt: skip

    def _digest(self) -> str:
        sha = hashlib.sha256()
        for chunk in self._chunks:
            sha.update(chunk)
        return sha.hexdigest()

    def part(self, at: int, most: int) -> Data:
        """The bytes of the payload from ``at`` on, ``most`` of them at most; where they lie, if it is one place."""
        found, left = [], most
        i = bisect_right(self._starts, at) - 1
        while left and i < len(self._chunks):
            piece = self._chunks[i][max(0, at - self._starts[i]) :][:left]
            found.append(piece)
            left -= len(piece)
            i += 1
        return found[0] if len(found) == 1 else joined(found)


def cut(parcel: Parcel, known: Collection[str]) -> tuple[list[Any], list[Any]]:
    """What goes where in a message (bytes that travel, or the SHA-256 of what is known), and the pieces that travel."""
    recipe: list[Any] = []
    pieces: list[Any] = []

    def travel(part: Parcel) -> None:
        chunks = list(part.chunks())
        length = sum(len(memoryview(chunk).cast("B")) for chunk in chunks)
        pieces.extend(chunks)
        if recipe and isinstance(recipe[-1], int):
            recipe[-1] += length
        else:
            recipe.append(length)

    travel(Parcel(parcel.header, ()))
    for begin, end in parcel.runs:
        part = Parcel(b"", parcel.leaves[begin:end])
        if part.nbytes and part.digest in known:
            recipe.append(part.digest)
        else:
            travel(part)
    return recipe, pieces
