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
from collections.abc import Callable, Mapping
from pathlib import Path

PULL, PUSH, BUNDLE = "/v1/fleet/pull-messages", "/v1/fleet/push-messages", "/v1/fleet/get-fab"
NODE = {PULL, PUSH, BUNDLE} | {
    f"/v1/fleet/{act}"
    for act in ("register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat",
                "get-run", "push-object", "pull-object", "confirm-message-received")
}  # fmt: skip
HOLD = 20.0  # seconds that a node's question for messages is kept waiting; it gives up after 30
SILENCE = 90.0  # seconds without a byte after which a connection is closed
MOST_HEAD, MOST_BUNDLE, PIECE = 32 << 10, 1 << 20, 256 << 10
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
        who: Callable[[socket.socket], str | None] = lambda sock: "", held: Callable[[str, Head], bool],
        let_in: Callable[[bytes], bool] = lambda bundle: True,
    ) -> None:  # fmt: skip
        self.dial, self.context, self.who, self.held, self.let_in = dial, context, who, held, let_in
        self._listening = socket.create_server(address, backlog=64)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """One connection, from its handshake to its end."""
        outer: socket.socket | None = None
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
                if asked.first[1] not in NODE or not self.held(name, asked):
                    sock.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    return
                if outer is None:
                    outer = self.dial()
                    outside = Wire(outer)
                self._exchange(asked, inside, outside)
        except (Closed, OSError, ValueError):
            pass  # whoever was here asks again
        finally:
            sock.close()
            if outer is not None:
                outer.close()

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
        self._listening.close()


class Front:
    """What the coordinator's gate knows: who each node belongs to, and who has something to fetch or has said something.

    ``members`` says by the SHA-256 (hexadecimal) of a certificate whose it is: nobody else is let in.
    """

    def __init__(self, members: Mapping[str, str]) -> None:
        self.members, self._known = members, threading.Condition()
        self._waiting = dict.fromkeys(members.values(), 0)
        self._said: dict[str, bool] = {}
        self.nodes: dict[str, str] = {}  # site -> the public key of its node
        self.news = 0
        self.told: dict[str, int] = dict.fromkeys(members.values(), 0)

    def who(self, sock: socket.socket) -> str | None:
        """The site at the other end."""
        shown = sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None
        return self.members.get(hashlib.sha256(shown).hexdigest()) if shown else None

    def held(self, site: str, head: Head) -> bool:
        """Keeps a question for messages waiting; notes what a site has said once all of it has come."""
        path, key = head.first[1], head.fields.get("flwr-public-key", "")
        with self._known:
            if path.endswith("/activate-node"):
                self.nodes[site], self._waiting[site] = key, 0
                self._tell(site)
            elif self.nodes.get(site) == key and path == PUSH:
                self._said[site] = True
            elif self.nodes.get(site) == key and path == PULL:
                if self._said.pop(site, False):
                    self._tell(site)
                self._known.wait_for(lambda: self._waiting[site] > 0 or self.nodes.get(site) != key, HOLD)
                self._waiting[site] = max(0, self._waiting[site] - 1)
        return True

    def _tell(self, site: str) -> None:
        self.news += 1
        self.told[site] = self.news
        self._known.notify_all()

    def sent(self, site: str) -> None:
        """Something lies ready for a site."""
        with self._known:
            self._waiting[site] = self._waiting.get(site, 0) + 1
            self._known.notify_all()

    def since(self, news: int, seconds: float) -> dict[str, object]:
        """Which sites have said something, or come back, after ``news``; waits for it up to ``seconds``."""
        with self._known:
            self._known.wait_for(lambda: self.news > news, seconds)
            changed = [site for site, when in self.told.items() if when > news]
            return {"news": self.news, "changed": changed, "nodes": dict(self.nodes)}


def certified(certificate: Path, key: Path, root: Path, server: bool) -> ssl.SSLContext:
    """How a member speaks TLS: it shows its certificate, and talks to nobody without one of the same root."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(root)
    context.load_cert_chain(certificate, key)
    return context


def to_coordinator(address: tuple[str, int], name: str, context: ssl.SSLContext) -> Dial:
    """Dials the coordinator's gate, and holds it to its name in the consortium wherever it stands."""

    def dial() -> socket.socket:
        return context.wrap_socket(socket.create_connection(address, timeout=10.0), server_hostname=name)

    return dial
