"""Tools of those who would get in: a carrier that looks, a coordinator that says what it likes, what a site keeps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import echo
from between import TALK, Between, Straight
from fedscan import wire
from fedscan.engines import envelope
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Manner
from fedscan.engines.envelope import ANSWER, EPOCH, REQUEST, Seal, Talk
from fedscan.recorded import Letter
from fedscan.study import Turn
from unsigned import Unsigned

SITE = echo.NAMES[0]
HEX = "0" * 64
Seals = Callable[[str], Seal]
Told = tuple[dict[str, Any], bytes]


class Tap(Straight):
    """Keeps what it carries. ``down`` and ``up`` may change a request and an answer, or lose them."""

    def __init__(self, desks: dict[str, Desk]) -> None:
        super().__init__(desks)
        self.requests: list[tuple[str, bytes]] = []
        self.answers: list[tuple[str, bytes]] = []

    def down(self, site: str, request: bytes) -> bytes:
        return request

    def up(self, site: str, said: bytes) -> bytes:
        return said

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        self.requests.append((site, request))
        said = super().call(site, self.down(site, request), seconds)
        self.answers.append((site, said))
        return self.up(site, said)


class Speaker:
    """A coordinator, or who would be one, that says to a site whatever it likes."""

    def __init__(self, desk: Desk, seal: Seal | None = None, talk: Talk = TALK, number: int = EPOCH) -> None:
        self.desk, self.seal, self.talk, self.number = desk, seal or Unsigned("coordinator"), talk, number

    def sealed(self, header: Mapping[str, Any], body: bytes = b"", to: str = "") -> bytes:
        self.number += 1
        whole = {"number": self.number, "wait": 5.0, **header}
        return envelope.sealed(REQUEST, whole, body, self.talk, to or self.desk.name, self.seal)

    def say(self, header: Mapping[str, Any], body: bytes = b"", to: str = "") -> Told:
        return opened(self.desk, self.desk.handle(self.sealed(header, body, to)))


def opened(desk: Desk, said: bytes) -> Told:
    """An answer, as the coordinator is to read it."""
    header, body = parted(said)
    assert header["from"] == desk.name
    assert header["kind"] == ANSWER
    if "why" in header:
        assert 0 < len(header["why"]) <= 500
        assert header["why"].isprintable(), header["why"]
    return header, body


def question(weights: Mapping[str, Any], turn: Any = (1, 0), **other: Any) -> Told:
    """The request and the body of an honest question, but for what is said."""
    parcel = wire.pack({"weights": weights})
    header = {
        "act": "ask", "turn": list(turn), "question": "echo", "base": None, "asked": parcel.digest,
        "nbytes": parcel.nbytes, "recipe": [], "payload": parcel.digest, "travels": parcel.nbytes, "ledger": "",
        **other,
    }  # fmt: skip
    return header, bytes(parcel)


def traces(folder: Path) -> dict[str, bytes]:
    """All that a site keeps."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flipped(data: bytes, bit: int) -> bytes:
    """The data with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def one_desk(folder: Path, seals: Seals = Unsigned, size: int = 2_000, **options: Any) -> Desk:
    between = Between(echo.study((SITE,), size=size), folder, seals, **options)
    return between.desks[SITE]


def parted(data: bytes) -> Told:
    length = int.from_bytes(data[:4], "big")
    return wire.loads(data[4 : 4 + length]), data[4 + length :]


def letter_of(study: Any) -> Letter:
    message = {"weights": study.start()["weights"]}
    return Letter(Turn(1, 0, SITE), "echo", message, wire.pack(message), None)


def smaller_parts(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(Straight, "manner", Manner(part=nbytes))
