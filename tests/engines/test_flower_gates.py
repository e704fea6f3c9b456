"""From gate to gate over a network that breaks: each request is answered, and done once. Without Flower."""

import http.client
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from faultproxy import Proxy
from fedscan.engines import flower_gate
from fedscan.engines.flower_gate import FLEET, Gate, SiteGate, connected


class Link(BaseHTTPRequestHandler):
    """Stands in for a SuperLink: counts what it is asked, and says it backwards."""

    protocol_version = "HTTP/1.1"
    done: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.done.append(body)
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Way:
    """From a node to a SuperLink."""

    inner: SiteGate
    network: Proxy
    outer: Gate

    def ask(self, body: bytes, act: str = "push-object", seconds: float = 30.0) -> bytes:
        node = http.client.HTTPConnection("127.0.0.1", self.inner.port, timeout=seconds)
        node.request("POST", FLEET + act, body)
        answer = node.getresponse().read()
        node.close()
        return answer


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    monkeypatch.setattr(SiteGate, "silence", 1.0)
    Link.done.clear()
    link = ThreadingHTTPServer(("127.0.0.1", 0), Link)
    threading.Thread(target=link.serve_forever, daemon=True).start()
    outer = Gate(("127.0.0.1", 0), lambda: connected(("127.0.0.1", link.server_port)))
    network = Proxy(outer.port, seed=3)
    dial = lambda: socket.create_connection(("127.0.0.1", network.port), 5.0)  # noqa: E731
    inner = SiteGate(("127.0.0.1", 0), dial, lambda bundle: True)
    yield Way(inner, network, outer)
    inner.close()
    network.close()
    outer.close()
    link.shutdown()


def test_what_is_asked_over_connections_that_are_reset_is_answered_and_done_once(way: Way) -> None:
    way.network.latency = 0.03
    way.network.flaky(0.15)
    asked: list[bytes] = []
    with ThreadPoolExecutor(4) as pool:
        while way.network.resets <= 5:  # connections break by the clock, however fast the machine is
            more = [f"request {n}".encode() * 100 for n in range(len(asked), len(asked) + 40)]
            assert list(pool.map(way.ask, more)) == [body[::-1] for body in more]
            asked += more
    assert sorted(Link.done) == sorted(asked)


def test_what_is_long_arrives_whole(way: Way) -> None:
    way.network.rate = 4 << 20
    way.network.flaky(0.5)
    body = bytes(range(256)) * 4096
    assert way.ask(body) == body[::-1]
    assert set(Link.done) == {body}


@pytest.mark.parametrize("how", ["cut", "deaf", "stranded"])
def test_a_request_waits_until_the_network_is_back(way: Way, how: str) -> None:
    way.ask(b"before")
    match how:
        case "cut":
            way.network.cut()
        case "deaf":
            way.network.deaf = True
        case _:
            way.network.strand()
    threading.Timer(2.0, way.network.mend).start()
    begun = time.monotonic()
    assert way.ask(b"word") == b"drow"
    assert time.monotonic() - begun < 6.0
    assert Link.done == [b"before", b"word"]


def test_a_node_that_waits_is_told_so(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives up after so many seconds in which it hears nothing; the network is away for longer."""
    monkeypatch.setattr("fedscan.engines.flower_wire.BEAT", 0.2)
    way.network.cut()
    threading.Timer(2.0, way.network.mend).start()
    assert way.ask(b"word", seconds=1.0) == b"drow"


def test_who_has_gone_is_not_answered_for_ever(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedscan.engines.flower_wire.BEAT", 0.1)
    way.network.cut()
    node = http.client.HTTPConnection("127.0.0.1", way.inner.port, timeout=0.05)
    node.request("POST", FLEET + "push-object", b"word")
    with pytest.raises(TimeoutError):
        node.getresponse()
    node.close()
    time.sleep(1.5)
    way.network.mend()
    time.sleep(1.5)
    assert Link.done == []


def test_a_site_has_room_for_so_many_long_requests(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_gate, "MOST_LONG", 0)
    assert way.ask(b"short") == b"trohs"
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        way.ask(bytes(1 << 20))
    assert Link.done == [b"short"]


def test_one_certificate_with_many_connections_keeps_no_other_hospital_out(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_gate, "MOST_EACH", 3)
    way.outer._room = threading.BoundedSemaphore(10)
    way.outer.who = lambda sock: "greedy"
    many = [socket.create_connection(("127.0.0.1", way.outer.port), 5.0) for _ in range(20)]
    until = time.monotonic() + 5.0
    while len(select.select(many, [], [], 0.05)[0]) < 17 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(select.select(many, [], [], 0.2)[0]) == 17  # these are hung up on, the others wait
    way.outer.who = lambda sock: "other"
    assert way.ask(b"word", seconds=5.0) == b"drow"
    for sock in many:
        sock.close()


@pytest.mark.parametrize(("how", "longest"), [("barred", 30.0), ("cut", 1.0)])
def test_who_is_not_let_in_asks_again_later_and_later(way: Way, how: str, longest: float) -> None:
    """But a network that is gone is tried each second: it may be back at any time."""
    waited: list[float] = []
    way.inner._closed.wait = lambda seconds: bool(waited.append(seconds)) or len(waited) > 10  # type: ignore
    if how == "barred":
        way.outer.who = lambda sock: None
    else:
        way.network.cut()
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        way.ask(b"word")
    assert waited == sorted(waited)
    assert waited[-1] == longest
    assert Link.done == []
