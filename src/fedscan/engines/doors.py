"""Bytes from process to process on one machine: frames over a loopback socket that only the owner's processes find.

Whoever opens a door writes ``door.json`` (port and token, mode 600) into its folder; whoever knocks reads it there. An
engine's own process is handed envelopes through a door and hands them on; it needs nothing of fedscan but this module,
which imports the standard library only. What passes is sealed by those who wrote it: a door believes nothing.
"""

import json
import mmap
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FILE = "door.json"
MOST_HEADER = 64 << 10
MOST_BODY = 80 << 20  # of one frame; larger messages go in parts
LARGE = 1 << 20  # bytes that are worth large pages
Came = bytes | bytearray | mmap.mmap
Data = Came | memoryview  # nobody writes into it any more
Forward = Callable[[str, Any, float], Data]  # site, request and seconds to wait; raises Lost


class Lost(Exception):
    """A request or its answer did not come through; it may or may not have arrived. The text says why."""


class Barred(Lost):
    """Who is asked may not be asked any more, so that it would not help to ask again."""


@dataclass(frozen=True)
class Manner:
    """How a carrier carries best what is large: in parts of ``part`` bytes, ``flight`` of them on their way at once.

    ``patience`` is how many seconds a site may keep a request waiting for its answer.
    """

    part: int = 4 << 20
    flight: int = 1
    patience: float = 10.0


class Carrier(Protocol):
    """Brings one request to one site and what the site says back.

    It may lose, repeat, delay or reorder both, and is believed in nothing: requests and answers are sealed, and each
    can be asked for again.
    """

    @property
    def manner(self) -> Manner: ...
    def call(self, site: str, request: Came, seconds: float) -> Came:
        """What the site said to the request. Raises Lost where nothing came within ``seconds``."""
        ...


def put(sock: socket.socket, header: Mapping[str, Any], body: Data = b"") -> None:
    """Sends one frame: the lengths of both parts (4 and 8 bytes), the header as JSON, the body."""
    text = json.dumps(header).encode()
    sock.sendall(len(text).to_bytes(4, "big") + len(body).to_bytes(8, "big") + text)
    if body:
        sock.sendall(body)


def take(sock: socket.socket) -> tuple[dict[str, Any], Came]:
    """The next frame. Raises Lost where the other side has gone, or announces more than ``MOST_BODY`` bytes."""
    told, length = announced(sock)
    return told, exactly(sock, length)


def announced(sock: socket.socket) -> tuple[dict[str, Any], int]:
    """The header of the next frame, and how many bytes its body has, which are still to be taken. Raises Lost."""
    lengths = exactly(sock, 12)
    header, body = int.from_bytes(lengths[:4], "big"), int.from_bytes(lengths[4:], "big")
    if header > MOST_HEADER or body > MOST_BODY:
        raise Lost(f"a frame of {header} and {body} bytes was announced; at most {MOST_HEADER} and {MOST_BODY} pass")
    try:
        told = json.loads(exactly(sock, header)[:])
    except (ValueError, RecursionError) as e:
        raise Lost("a frame without a proper header came") from e
    if not isinstance(told, dict):
        raise Lost("a frame without a proper header came")
    return told, body


def exactly(sock: socket.socket, length: int) -> bytearray | mmap.mmap:
    """That many bytes."""
    data, at = room(length), 0
    with memoryview(data) as view:
        while at < length:
            came = sock.recv_into(view[at:])
            if not came:
                raise Lost("the connection was closed")
            at += came
    return data


def room(length: int) -> bytearray | mmap.mmap:
    """Memory for so many bytes; for many, in large pages: it costs less to fill those than to be given small ones."""
    if length < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(length)
    found = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


def joined(pieces: Sequence[Data]) -> Came:
    """The pieces in a row."""
    length = sum(map(len, pieces))
    if length < LARGE:
        return b"".join(pieces)
    found, at = room(length), 0
    for piece in pieces:
        found[at : at + len(piece)] = piece
        at += len(piece)
    return found


class Door:
    """An open door: answers each frame that comes through it by what ``answer`` makes of header and body.

    ``answer`` runs in a thread of its caller's connection, several at a time.
    """

    def __init__(self, folder: Path, answer: Callable[[dict[str, Any], Any], Data]) -> None:
        self.folder, self.answer, self.token = folder, answer, secrets.token_hex(16)
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        partial = folder / f".{FILE}.{os.getpid()}"
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"port": self._listening.getsockname()[1], "token": self.token, "pid": os.getpid()}, file)
        partial.rename(folder / FILE)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:  # closed
                return
            self._open.add(sock)
            threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    def _converse(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._exchange(sock):
                pass
        except (Lost, OSError):
            pass  # the caller has gone, or sends what is no frame: it has to knock again
        finally:
            self._open.discard(sock)
            sock.close()

    def _exchange(self, sock: socket.socket) -> bool:
        """Answers one frame, and keeps nothing of it; whether the caller may send another."""
        header, length = announced(sock)
        if not secrets.compare_digest(str(header.get("token")).encode(), self.token.encode()):
            put(sock, {"lost": "the caller does not know this door's token"})
            return False
        body = exactly(sock, length)
        try:
            put(sock, {}, self.answer(header, body))
        except Lost as e:
            put(sock, {"lost": str(e)[:1000]})
        return True

    def close(self) -> None:
        """Closes the door, and ends every conversation through it."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # else whoever waits for callers lets one more in
        self._listening.close()
        for sock in list(self._open):
            sock.close()


class Knock:
    """Calls through the door of another process, over one connection for each thread that calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._mine = folder, threading.local()

    def call(self, header: Mapping[str, Any], body: Data, seconds: float) -> Came:
        """What is said behind the door. Raises Lost where nobody opens, or nothing is said within ``seconds``."""
        try:
            sock, token = self._connected(seconds)
            sock.settimeout(seconds)
            put(sock, {**header, "token": token}, body)
            told, said = take(sock)
        except (OSError, Lost) as e:
            self.close()
            match e:
                case TimeoutError():
                    why = f"nothing was said within {seconds:g} s"
                case ConnectionError():
                    why = "nobody is there"
                case _:
                    why = str(e)
            raise Lost(why) from e
        if "lost" in told:
            raise Lost(str(told["lost"]))
        return said

    def _connected(self, seconds: float) -> tuple[socket.socket, str]:
        if getattr(self._mine, "sock", None) is None:
            try:
                told = json.loads((self.folder / FILE).read_text())
                port, token = int(told["port"]), str(told["token"])
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise Lost("nobody is there yet") from e
            sock = socket.create_connection(("127.0.0.1", port), timeout=min(seconds, 5.0))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._mine.sock, self._mine.token = sock, token
        return self._mine.sock, self._mine.token

    def close(self) -> None:
        """Hangs up, for the thread that calls."""
        sock, self._mine.sock = getattr(self._mine, "sock", None), None
        if sock is not None:
            sock.close()


class Doors:
    """The carrier to sites on this machine: each has a door in its folder."""

    manner = Manner()

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._knocks = {site: Knock(folder) for site, folder in folders.items()}

    def call(self, site: str, request: Came, seconds: float) -> Came:
        """What the site said to the request. Raises Lost."""
        return self._knocks[site].call({}, request, seconds)


class Relayed:
    """The carrier over an engine: its own process keeps a door in ``folder``, opened by ``relay``."""

    def __init__(self, folder: Path, manner: Manner = Manner()) -> None:
        self._knock, self.manner = Knock(folder), manner

    def call(self, site: str, request: Came, seconds: float) -> Came:
        """What the site said to the request. Raises Lost."""
        return self._knock.call({"site": site, "seconds": seconds}, request, seconds + 5.0)


def relay(folder: Path, forward: Forward) -> Door:
    """Opens the door through which an engine's process at the coordinator is handed requests to bring to sites."""
    return Door(folder, lambda header, body: forward(str(header["site"]), body, float(header["seconds"])))


def hand_in(folder: Path, request: Data, seconds: float) -> Came:
    """Hands a request that an engine has brought to the site whose door is in ``folder``; returns what it says.

    For an engine's process at a site. A site that is just starting again is waited for. Raises Lost.
    """
    until, knock = time.monotonic() + seconds, Knock(folder)
    try:
        while True:
            try:
                return knock.call({}, request, max(0.1, until - time.monotonic()))
            except Lost:
                if time.monotonic() + 0.2 > until:
                    raise
                time.sleep(0.2)
    finally:
        knock.close()
