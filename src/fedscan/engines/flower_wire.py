"""What passes through the gates of Flower's processes: HTTP/1.1 with bodies of known length, over one connection each.

Standard library only.
"""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from tempfile import SpooledTemporaryFile

FRESH = 2.0  # seconds for which an idle connection is used again: Flower closes it after 5
BEAT = 3.0  # seconds until whoever waits is told that the answer is still to come
WAIT = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNK = 8 << 20  # bytes that Flower puts into one request at most
MOST_BODY = 2 * CHUNK
PIECE, MOST_HEAD = 256 << 10, 32 << 10
SMALL = 256 << 10  # bytes that are kept in memory; more are a file
Dial = Callable[[], socket.socket]
Body = SpooledTemporaryFile[bytes]


class Closed(Exception):
    """The other side of a connection has gone, or what it sends is no HTTP."""


class Head:
    """The first lines of a request or an answer of HTTP/1.1, and how many bytes follow."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        first, *lines = text.decode("latin-1").split("\r\n")[:-2]
        self.first = first.split(" ")
        self.fields = {name.strip().lower(): value.strip() for name, _, value in (li.partition(":") for li in lines)}
        length = self.fields.get("content-length", "0")
        if "transfer-encoding" in self.fields or not length.isdecimal() or len(self.first) < 2:
            raise Closed
        self.length = int(length)
        if self.length > MOST_BODY:
            raise Closed


class Wire:
    """One end of a connection: heads and bodies in, bytes out. It is given up after ``silence`` seconds."""

    def __init__(self, sock: socket.socket, silence: float) -> None:
        sock.settimeout(silence)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self._read = sock, io.BufferedReader(socket.SocketIO(sock, "r"), PIECE)

    def head(self) -> Head:
        """The next head. Raises Closed."""
        text = b""
        while not text.endswith(b"\r\n\r\n"):
            line = self._read.readline(MOST_HEAD)
            text += line
            if not line.endswith(b"\r\n") or len(text) > MOST_HEAD:
                raise Closed
        return Head(text)

    def pieces(self, length: int) -> Iterator[bytes]:
        """That many bytes, as they come. Raises Closed."""
        while length:
            piece = self._read.read1(min(length, PIECE))
            if not piece:
                raise Closed
            yield piece
            length -= len(piece)

    def body(self, length: int) -> "Body":
        """That many bytes; many of them in a file. Raises Closed."""
        body = nothing()
        for piece in self.pieces(length):
            body.write(piece)
        body.seek(0)
        return body

    def send(self, text: bytes, body: "Body") -> None:
        """A head, and the body that belongs to it."""
        self.sock.sendall(text)
        while piece := body.read(PIECE):
            self.sock.sendall(piece)
        body.seek(0)


def nothing() -> Body:
    """A body without bytes; where many are written into it, it becomes a file."""
    return SpooledTemporaryFile(SMALL)


class Way:
    """A connection to where ``dial`` leads, made anew where it has been idle or was lost."""

    def __init__(self, dial: Dial, silence: float) -> None:
        self.dial, self.silence, self.used = dial, silence, 0.0
        self._wire: Wire | None = None

    def wire(self) -> Wire:
        """The connection. Raises OSError where there is none."""
        if self._wire is None or time.monotonic() > self.used + FRESH:
            self.close()
            self._wire = Wire(self.dial(), self.silence)
        return self._wire

    def ask(self, text: bytes, body: Body, seconds: float = 0.0) -> tuple[Head, Wire]:
        """The head of what is said to a request, within so many seconds more than usual, and where its body comes.

        Raises Closed and OSError.
        """
        wire = self.wire()
        wire.send(text, body)
        wire.sock.settimeout(self.silence + seconds)
        while (told := wire.head()).first[1].startswith("1"):
            pass  # still to come
        wire.sock.settimeout(self.silence)
        return told, wire

    def close(self) -> None:
        """Hangs up."""
        if self._wire is not None:
            self._wire.sock.close()
            self._wire = None


class Waiting:
    """Tells whoever has asked, every few seconds of this context, that the answer is still to come.

    Flower's node gives up after 30 seconds without a word, and then asks again later and later.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire, self.gone, self._over = wire, False, threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def _tell(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.wire.sock.sendall(WAIT)
            except OSError:
                self.gone = True
                return

    def __enter__(self) -> "Waiting":
        self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._teller.join()
