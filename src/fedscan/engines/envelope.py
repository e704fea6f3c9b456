"""One request to a site, and what it says back: a signed header, and bytes that the header vouches for.

The header says who speaks to whom, of which study and run, and names the bytes by their SHA-256; an answer names the
request that it answers in the same way. What was changed, came to the wrong place, belongs to another study or run, or
is an old one played again, is refused before anything is made of it.
"""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedscan import __version__
from fedscan.engines.doors import Came, Data, joined
from fedscan.spec import Refused

PROTOCOL = 1
REQUEST, ANSWER = "request", "answer"  # kinds of documents, so that neither can stand in for the other
MOST_HEADER = 256 << 10
MOST_PART = 64 << 20  # bytes of a message or an answer that travel at once, whatever a carrier would like
EPOCH = 1 << 40  # numbers of requests that one start of the coordinator may use


class Seal(Protocol):
    """Signs for one member, and tells who signed what comes from others."""

    name: str

    def sign(self, header: Mapping[str, Any]) -> bytes:
        """The header as bytes that only this member can have written."""
        ...

    def signer(self, data: bytes, kind: str) -> tuple[str, Mapping[str, Any]]:
        """Who signed a header of this kind, and the header. Raises Refused with one sentence."""
        ...


@dataclass(frozen=True)
class Talk:
    """What both ends of a conversation have to agree on.

    study   the hash that the site approved
    run     drawn by the coordinator, another for each run; empty where any is spoken of
    """

    study: str
    run: str
    coordinator: str


def sealed(kind: str, header: Mapping[str, Any], body: Data, talk: Talk, to: str, seal: Seal) -> Came:
    """A request or an answer as bytes: the length of its header (4 bytes), the signed header, the body."""
    whole = {
        **header, "kind": kind, "protocol": PROTOCOL, "fedscan": __version__, "study": talk.study, "run": talk.run,
        "from": seal.name, "to": to, "body": hashlib.sha256(body).hexdigest(),
    }  # fmt: skip
    text = seal.sign(whole)
    return joined((len(text).to_bytes(4, "big"), text, body))


def opened(kind: str, data: Came, talk: Talk, sender: str, seal: Seal) -> tuple[dict[str, Any], memoryview]:
    """The header and the body of a request or an answer. Raises Refused, in one sentence, for any that is not whole,
    not from ``sender``, not to this member, or of another study, run or version."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 or length > min(MOST_HEADER, len(data) - 4):
        raise Refused(f"what came has {len(data)} bytes and is no {kind}: it was cut on its way, or is not fedscan's")
    who, found = seal.signer(bytes(data[4 : 4 + length]), kind)
    header, body = dict(found), memoryview(data)[4 + length :]
    if header.get("protocol") != PROTOCOL or header.get("fedscan") != __version__:
        theirs = f"{str(header.get('fedscan'))[:20]} (protocol {str(header.get('protocol'))[:9]})"
        raise Refused(
            f"{who} runs fedscan {theirs}, and here it is {__version__} (protocol {PROTOCOL}): all members "
            "of a study run the same version, so install it there or here"
        )
    if (who, header.get("from"), header.get("to")) != (sender, sender, seal.name):
        raise Refused(
            f"a {kind} by {who!r} to {str(header.get('to'))[:60]!r} came to {seal.name!r} as one by {sender!r}"
        )
    if header.get("study") != talk.study:
        raise Refused(f"{who} asks for study {str(header.get('study'))[:12]}, and {talk.study[:12]} was agreed on")
    if talk.run and header.get("run") != talk.run:
        raise Refused(f"a {kind} of run {str(header.get('run'))[:12]} came, and this is run {talk.run[:12]}")
    if header.get("body") != hashlib.sha256(body).hexdigest():
        raise Refused(f"the bytes of a {kind} by {who} were changed on their way")
    return header, body


def signed_part(data: Came) -> str:
    """The signed header of a request or an answer, as it was signed."""
    return data[4 : 4 + int.from_bytes(data[:4], "big")].decode(errors="replace")


def plain(text: object) -> str:
    """What somebody else wrote, as it can be signed, logged and shown: one line of at most 500 printable characters."""
    normal = unicodedata.normalize("NFC", str(text)[:500])[:500]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in normal)


def mark(data: Came) -> str:
    """SHA-256 of a request's header, by which its answer names it: the header says what the body is."""
    return hashlib.sha256(data[: 4 + int.from_bytes(data[:4], "big")]).hexdigest()
