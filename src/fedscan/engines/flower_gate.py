"""The gate between Flower's processes of one member and the outside: mutual TLS, and nothing but a node's own requests.

Flower asks sites for no certificate, and its one port also takes orders to run code. So its processes speak plain HTTP
on loopback only, and what leaves the machine goes from gate to gate over TLS 1.3 between certificates of the
consortium. The coordinator's gate lets through what a node of Flower has to ask, and no order; a site's gate lets in no
bundle that holds code. Where a node asks for messages and there is none, the gate keeps it waiting until there is one:
the node would sleep for three seconds otherwise. And a connection that is lost between two gates is their own business:
what was asked is asked again, and done once. Standard library only.
"""

import hashlib
import secrets
import socket
import ssl
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fedscan.engines.flower_wire import BEAT, SMALL, Body, Closed, Dial, Head, Waiting, Way, Wire

FLEET = "/v1/fleet/"
PULL, PUSH, BUNDLE = FLEET + "pull-messages", FLEET + "push-messages", FLEET + "get-fab"
REGISTER, ACTIVATE = FLEET + "register-node", FLEET + "activate-node"
OTHERS = ("deactivate-node", "unregister-node", "send-node-heartbeat", "get-run", "push-object", "pull-object")
NODE = {PULL, PUSH, BUNDLE, REGISTER, ACTIVATE, FLEET + "confirm-message-received", *(FLEET + name for name in OTHERS)}
HOLD = 20.0  # seconds that a node's question for messages is kept waiting; it gives up after 30
ABSENT = 75.0  # seconds after which a node is gone that has asked for nothing: its heart beats every 30
SILENCE = 90.0  # seconds without a byte after which a connection is closed
DIAL = 5.0  # seconds that it may take to reach the coordinator's gate
AGAIN, LATER = 1.0, 30.0  # seconds until it is tried again, at most; and where it has said that it does not want to
SLOWEST = 32 << 10  # bytes a second of the slowest line
NONE = b"content-length: 0\r\nconnection: close\r\n\r\n"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\n" + NONE
BARRED = b"HTTP/1.1 403 Barred\r\n" + NONE  # to a member whom the roster does not let in (any more)
UNKNOWN = b"HTTP/1.1 401 Unauthorized\r\n" + NONE  # at this, a node ends itself, and is started again
MARK = "fedscan-request"  # the line of a head by which a request is known that comes again
KEPT = 32  # short answers of a site that are kept, for requests that come again
MOST_BUNDLE = 1 << 20
MOST_LONG = 16  # requests of a site at once that are longer than what is kept in memory
MOST_CALLERS = 1000  # connections at once
MOST_EACH = 64  # of one member


class Barred(Closed):
    """The coordinator's gate does not let this member in."""


class Once:
    """A request that may come over several connections, and what was said to it: it is done once."""

    def __init__(self) -> None:
        self.doing, self.said = threading.Lock(), b""


class Gate:
    """The coordinator's: passes requests on, one after the other for each connection, to where ``dial`` leads.

    ``who`` says whose connection it is; ``held`` is called with that and each request's head before the request goes
    on, and may refuse it by False or keep it waiting. A request that a site's gate sends again, since it lost the
    connection, is not done again: it is told what was said.
    """

    silence = SILENCE  # seconds after which a connection onwards is given up

    def __init__(
        self, address: tuple[str, int], dial: Dial, *, context: ssl.SSLContext | None = None,
        who: Callable[[socket.socket], str | None] = lambda sock: "",
        held: Callable[[str, Head], bool] = lambda name, head: True,
    ) -> None:  # fmt: skip
        self.dial, self.context, self.who, self.held = dial, context, who, held
        self._closed, self._room = threading.Event(), threading.BoundedSemaphore(MOST_CALLERS)
        self._asked: dict[str, OrderedDict[str, Once]] = {}  # by who asks, what came last
        self._here, self._long, self._lock = Counter[str | None](), Counter[str | None](), threading.Lock()
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
        way = Way(self.dial, self.silence)
        try:
            sock.settimeout(10.0)
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            name = self.who(sock)
            inside = Wire(sock, 10.0 if name is None else SILENCE)
            with self._space(self._here, name, 1, MOST_EACH):
                while self._served(name, inside, way):
                    way.used = self.used = time.monotonic()
        except (Closed, OSError, ValueError):
            pass  # whoever was here asks again
        finally:
            sock.close()
            way.close()
            self._room.release()

    def _served(self, name: str | None, inside: Wire, way: Way) -> bool:
        """Takes one request and answers it; whether another one may follow."""
        asked = inside.head()
        if name is None:
            inside.body(min(asked.length, SMALL))  # what is left unread resets the connection
        if name is None or asked.first[1] not in NODE:
            inside.sock.sendall(BARRED if name is None else FORBIDDEN)
            return False
        with self._space(self._long, name, int(asked.length > SMALL), MOST_LONG), inside.body(asked.length) as body:
            return self._answer(name, asked, body, inside, way)

    @contextmanager
    def _space(self, taken: Counter[str | None], name: str | None, more: int, most: int) -> Iterator[None]:
        """Takes room of a member, and gives it back. Raises Closed where it has taken all of its own already."""
        with self._lock:
            if taken[name] + more > most:
                raise Closed
            taken[name] += more
        try:
            yield
        finally:
            with self._lock:
                taken[name] -= more

    def _answer(self, name: str, asked: Head, body: Body, inside: Wire, way: Way) -> bool:
        """Answers one request; whether another one may follow."""
        once = self._once(name, asked)
        with Waiting(inside):
            known = bool(once.said) or self.held(name, asked)
            text, rest = self._done(once, asked, body, way) if known else (UNKNOWN, iter(()))
        inside.sock.sendall(text)
        for piece in rest:
            inside.sock.sendall(piece)
        return known

    def _once(self, name: str, asked: Head) -> Once:
        """What is known of a request: nothing, unless it came before."""
        mark = asked.fields.get(MARK)
        if mark is None:
            return Once()
        with self._lock:
            last = self._asked.setdefault(name, OrderedDict())
            last[mark] = last.pop(mark) if mark in last else Once()
            while len(last) > KEPT:
                last.popitem(last=False)
            return last[mark]

    def _done(self, once: Once, asked: Head, body: Body, way: Way) -> tuple[bytes, Iterator[bytes]]:
        """What is said to a request, by now or before; what is long was asked for, and can be asked for again."""
        with once.doing:
            if once.said:
                return once.said, iter(())
            told, wire = way.ask(asked.text, body)
            if told.length > SMALL:
                return told.text, wire.pieces(told.length)
            once.said = told.text + b"".join(wire.pieces(told.length))
            return once.said, iter(())

    def close(self) -> None:
        """Takes no connection any more."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # closing alone lets one more in
        self._listening.close()


class SiteGate(Gate):
    """A site's: passes on what its node asks until there is an answer, over as many connections as that takes.

    So a network that is cut for a while costs the node nothing but time. ``let_in`` is shown a bundle that came, and
    may refuse it by False.
    """

    silence = 4 * BEAT + 8.0  # the coordinator's gate says at every beat that an answer is still to come

    def __init__(self, address: tuple[str, int], dial: Dial, let_in: Callable[[bytes], bool]) -> None:
        self.let_in = let_in
        super().__init__(address, dial)

    def _answer(self, name: str, asked: Head, body: Body, inside: Wire, way: Way) -> bool:
        """Asks the coordinator's gate again and again, by a mark that tells it that it is the same request."""
        text = asked.text[:-2] + f"{MARK}: {secrets.token_hex(16)}\r\n\r\n".encode()
        pause = 0.1
        with Waiting(inside) as waiting:
            while True:
                try:
                    told, wire = way.ask(text, body, asked.length / SLOWEST)
                    if told.text == BARRED:
                        raise Barred
                    said = wire.body(told.length)
                    break
                except (Closed, OSError) as e:
                    way.close()
                    pause = min(2 * pause, LATER if isinstance(e, Barred) else AGAIN)
                    if waiting.gone or self._closed.wait(pause):
                        raise Closed from e
                    body.seek(0)
        with said:
            if asked.first[1] == BUNDLE:
                bundle = said.read(MOST_BUNDLE + 1)
                if len(bundle) > MOST_BUNDLE or (told.first[1] == "200" and not self.let_in(bundle)):
                    raise Closed
                said.seek(0)
            inside.send(told.text, said)
        return True


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
                self._seen[site] = time.monotonic()
                self._tell(site)
            if path == REGISTER:
                return True
            if self.nodes.get(site) != key or site not in self.members.values():
                return False
            if time.monotonic() > self._seen.get(site, 0.0) + ABSENT:
                self._tell(site)  # it is back
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

    return lambda: context.wrap_socket(socket.create_connection(address, DIAL), server_hostname=name)


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
