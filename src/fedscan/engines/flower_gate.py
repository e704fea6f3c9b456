"""The gate between Flower's processes of one member and the outside: mutual TLS, and nothing but a node's own requests.

Flower asks sites for no certificate, and its one port also takes orders to run code. So its processes speak plain HTTP
on loopback only, and what leaves the machine goes from gate to gate over TLS 1.3 between certificates of the
consortium. The coordinator's gate lets through what a node of Flower has to ask, and no order; a site's gate lets in no
bundle that holds code. Where a node asks for messages and there is none, the gate keeps it waiting until there is one:
the node would sleep for three seconds otherwise. Standard library only.
"""

import hashlib
import io
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

FLEET = "/v1/fleet/"
PULL, PUSH, BUNDLE = FLEET + "pull-messages", FLEET + "push-messages", FLEET + "get-fab"
REGISTER, ACTIVATE = FLEET + "register-node", FLEET + "activate-node"
OTHERS = ("deactivate-node", "unregister-node", "send-node-heartbeat", "get-run", "push-object", "pull-object")
NODE = {PULL, PUSH, BUNDLE, REGISTER, ACTIVATE, FLEET + "confirm-message-received", *(FLEET + name for name in OTHERS)}
HOLD = 20.0  # seconds that a node's question for messages is kept waiting; it gives up after 30
ABSENT = 75.0  # seconds after which a node is gone that has asked for nothing: its heart beats every 30
SILENCE = 90.0  # seconds without a byte after which a connection is closed
FRESH = 2.0  # seconds for which an idle connection is used again: Flower closes it after 5
FORBIDDEN = b"HTTP/1.1 403 Forbidden"
UNKNOWN = b"HTTP/1.1 401 Unauthorized"  # at this, a node ends itself, and is started again
PIECE, MOST_HEAD, MOST_BUNDLE = 256 << 10, 32 << 10, 1 << 20
CHUNK = 16 << 20  # bytes that Flower puts into one request at most
MOST_BODY = 2 * CHUNK
MOST_CALLERS = 1000  # connections at once
Dial = Callable[[], socket.socket]


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
    """One end of a connection: heads and bodies in, bytes out."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(SILENCE)
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

    def body(self, length: int) -> bytes:
        """That many bytes."""
        data = self._read.read(length)
        if data is None or len(data) < length:
            raise Closed
        return data

    def pump(self, length: int, to: "Wire") -> None:
        """Passes that many bytes on."""
        while length:
            piece = self._read.read1(min(length, PIECE))
            if not piece:
                raise Closed
            to.sock.sendall(piece)
            length -= len(piece)


class Gate:
    """Passes requests on, one after the other for each connection, to where ``dial`` leads.

    ``who`` says whose connection it is; ``held`` is called with that and each request's head before the request goes
    on, and may refuse it by False or keep it waiting; ``let_in`` with the bundle that came, and may refuse it by False.
    """

    def __init__(
        self, address: tuple[str, int], dial: Dial, *, context: ssl.SSLContext | None = None,
        who: Callable[[socket.socket], str | None] = lambda sock: "",
        held: Callable[[str, Head], bool] = lambda name, head: True,
        let_in: Callable[[bytes], bool] = lambda bundle: True,
    ) -> None:  # fmt: skip
        self.dial, self.context, self.who, self.held, self.let_in = dial, context, who, held, let_in
        self._closed, self._room = threading.Event(), threading.BoundedSemaphore(MOST_CALLERS)
        self.used = 0.0  # when something last came back from outside
        self._listening = socket.create_server(address, backlog=64)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._listening.accept()
            except OSError:  # closed, or this process has too many files open
                self._closed.wait(0.1)
                continue
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        """One connection, from its handshake to its end."""
        outer: socket.socket | None = None
        used = 0.0
        try:
            sock.settimeout(10.0)
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            name = self.who(sock)
            if name is None:
                return
            inside = Wire(sock)
            while True:
                asked = inside.head()
                refused = FORBIDDEN if asked.first[1] not in NODE else b"" if self.held(name, asked) else UNKNOWN
                if refused:
                    sock.sendall(refused + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    return
                if outer is None or time.monotonic() > used + FRESH:
                    if outer is not None:
                        outer.close()
                    outer = self.dial()
                    outside = Wire(outer)
                self._exchange(asked, inside, outside)
                self.used = used = time.monotonic()
        except (Closed, OSError, ValueError):
            pass  # whoever was here asks again
        finally:
            sock.close()
            if outer is not None:
                outer.close()
            self._room.release()

    def _exchange(self, asked: Head, inside: Wire, outside: Wire) -> None:
        """One request and its answer."""
        outside.sock.sendall(asked.text)
        inside.pump(asked.length, outside)
        told = outside.head()
        if asked.first[1] != BUNDLE:
            inside.sock.sendall(told.text)
            outside.pump(told.length, inside)
            return
        if told.length > MOST_BUNDLE:
            raise Closed
        bundle = outside.body(told.length)
        if told.first[1] == "200" and not self.let_in(bundle):
            raise Closed
        inside.sock.sendall(told.text + bundle)

    def close(self) -> None:
        """Takes no connection any more."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # closing alone lets one more in
        self._listening.close()


class Front:
    """What the coordinator's gate knows: whose node is whose, and who has something to fetch, or has said something.

    ``members`` says by the SHA-256 (hexadecimal) of a certificate whose it is: nobody else is let in.
    """

    def __init__(self, members: Mapping[str, str]) -> None:
        self.members, self._known = members, threading.Condition()
        self.nodes: dict[str, str] = {}  # site -> the public key of its node
        self._waiting: Counter[str] = Counter()  # site -> messages that lie ready for it
        self._pulls: Counter[str] = Counter()  # site -> how often it has asked for messages
        self._saying: set[str] = set()  # sites of whose answer not all has come
        self._seen: dict[str, float] = {}  # site -> when its node last asked for anything
        self._news, self._said = 0, dict[str, int]()  # site -> the number of its last news

    def who(self, sock: socket.socket) -> str | None:
        """The site at the other end."""
        shown = sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None
        return self.members.get(hashlib.sha256(shown).hexdigest()) if shown else None

    def held(self, site: str, head: Head) -> bool:
        """Keeps a question for messages waiting, and notes when all that a site has to say has come.

        A site has one node, the last that came; what an earlier one still asks is refused.
        """
        path, key = head.first[1], head.fields.get("flwr-public-key", "")
        with self._known:
            if path == ACTIVATE:
                self.nodes[site], self._waiting[site] = key, 0
                self._tell(site)
            if path == REGISTER:
                return True
            if self.nodes.get(site) != key or site not in self.members.values():
                return False
            self._seen[site] = time.monotonic()
            if path == PUSH:
                self._saying.add(site)
            if path != PULL:
                return True
            if site in self._saying:  # it asks for the next message: all of its answer has come
                self._saying.remove(site)
                self._tell(site)
            self._pulls[site] = mine = self._pulls[site] + 1
            until = time.monotonic() + HOLD
            while self._waiting[site] == 0 and (left := until - time.monotonic()) > 0:
                self._known.wait(left)
                if self.nodes.get(site) != key:
                    return False
                if self._pulls[site] != mine:  # it has asked again meanwhile, over another connection
                    raise Closed
            self._waiting[site] = max(0, self._waiting[site] - 1)
            return True

    def forget(self) -> None:
        """Forgets all nodes: what they spoke to has died, and they are started again when they next ask."""
        with self._known:
            self.nodes.clear()
            self._known.notify_all()

    def _tell(self, site: str) -> None:
        self._news += 1
        self._said[site] = self._news
        self._known.notify_all()

    def sent(self, site: str) -> None:
        """Something lies ready for a site."""
        with self._known:
            self._waiting[site] += 1
            self._known.notify_all()

    def since(self, news: int, seconds: float) -> dict[str, object]:
        """Which sites have said something, or come back, after ``news``; waits for it up to ``seconds``."""
        with self._known:
            self._known.wait_for(lambda: self._news != news, seconds)
            said = [site for site, when in self._said.items() if when > news or news > self._news]
            now = time.monotonic()
            here = {site: key for site, key in self.nodes.items() if now < self._seen.get(site, now) + ABSENT}
            return {"news": self._news, "said": said, "nodes": here}


def certified(home: Path, server: bool = False) -> ssl.SSLContext:
    """How a member speaks TLS: it shows its certificate, and talks to nobody without one of the same root."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(home / "root.pem")
    context.load_cert_chain(home / "certificate.pem", home / "key.pem")
    return context


def to_coordinator(address: tuple[str, int], name: str, context: ssl.SSLContext) -> Dial:
    """Dials the coordinator's gate, and holds it to its name in the consortium wherever it stands."""

    return lambda: context.wrap_socket(connected(address), server_hostname=name)


def connected(address: tuple[str, int]) -> socket.socket:
    """A connection, as soon as somebody is there: a node that is told at once that nobody is tries again much later."""
    until = time.monotonic() + HOLD
    while True:
        try:
            return socket.create_connection(address, timeout=10.0)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
