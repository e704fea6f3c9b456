"""The bad network of the tests does what it says; frames that pass through it are lost, and asked for again."""

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from between import Between
from contract import BENCHES, study_of
from faultproxy import Proxy
from fedscan.engines import remote
from fedscan.engines.doors import FILE, Door, Doors
from fedscan.methods.registry import get
from fedscan.run import run
from test_remote import record
from toy import same


@pytest.fixture
def network() -> Iterator[Proxy]:
    """A network to a server that says everything again."""
    listening = socket.create_server(("127.0.0.1", 0))

    def say_again(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            while data := sock.recv(1 << 16):
                sock.sendall(data)

    def listen() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=say_again, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    proxy = Proxy(listening.getsockname()[1], seed=1)
    yield proxy
    proxy.close()
    listening.close()


def called(network: Proxy, seconds: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", network.port), seconds)


def echoed(sock: socket.socket, data: bytes = b"word") -> float:
    """The seconds until all that was said has come back."""
    begun, back = time.monotonic(), b""

    def say() -> None:
        with suppress(OSError):
            sock.sendall(data)

    threading.Thread(target=say, daemon=True).start()
    while len(back) < len(data):
        piece = sock.recv(1 << 16)
        if not piece:
            raise ConnectionError("it was closed")
        back += piece
    assert back == data
    return time.monotonic() - begun


def silent(sock: socket.socket) -> bool:
    """Whether nothing comes back, and nothing says so."""
    sock.settimeout(0.3)
    sock.sendall(b"word")
    try:
        return sock.recv(1) == b"never"
    except TimeoutError:
        return True


def test_what_passes_is_counted_and_not_changed(network: Proxy) -> None:
    with called(network) as sock:
        echoed(sock, bytes(range(256)) * 8192)
    assert network.carried == {"up": 2 << 20, "down": 2 << 20}
    assert network.callers == 1


def test_latency_and_rate_and_loss_take_the_time_that_they_say(network: Proxy) -> None:
    with called(network) as sock:
        network.latency = 0.1
        assert echoed(sock) >= 0.2
        network.latency, network.rate = 0.0, 1 << 20
        assert echoed(sock, bytes(1 << 19)) >= 0.5
        network.rate, network.loss = math.inf, 0.3
        assert any(echoed(sock) >= 0.3 for _ in range(40))


def test_a_reset_is_felt_at_both_ends_and_a_new_connection_is_let_in(network: Proxy) -> None:
    with called(network) as sock:
        echoed(sock)
        network.reset()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert network.resets == 1
    with called(network) as sock:
        echoed(sock)


def test_resets_come_at_moments_that_nobody_knows(network: Proxy) -> None:
    network.flaky(0.1)
    until = time.monotonic() + 5.0
    while network.resets < 3 and time.monotonic() < until:
        with suppress(ConnectionError), called(network) as sock:
            while time.monotonic() < until:
                echoed(sock)
    assert network.resets >= 3
    network.mend()
    time.sleep(0.1)
    with called(network) as sock:
        assert echoed(sock, bytes(1 << 20)) < 5.0


def test_a_network_that_is_deaf_keeps_all_open_and_lets_in_whoever_calls(network: Proxy) -> None:
    with called(network) as before:
        echoed(before)
        network.deaf = True
        with called(network) as meanwhile:
            assert silent(before)
            assert silent(meanwhile)
            network.mend()
            before.settimeout(5.0)
            assert before.recv(4) == b"word"  # what was on its way comes late
            assert silent(meanwhile)  # who was let in meanwhile is forgotten


def test_connections_that_are_stranded_stay_so_and_new_ones_are_carried(network: Proxy) -> None:
    with called(network) as before, called(network) as after:
        echoed(before)
        network.strand()
        assert silent(before)
        network.mend()
        assert silent(before)
        with called(network) as after:
            echoed(after)


def test_a_cut_closes_all_and_refuses_new_ones_until_it_is_mended(network: Proxy) -> None:
    with called(network) as sock:
        echoed(sock)
        network.cut()
        with pytest.raises(ConnectionError):
            echoed(sock)
    with pytest.raises(ConnectionRefusedError):
        called(network)
    network.mend()
    with called(network) as sock:
        echoed(sock)


def test_a_study_over_frames_that_pass_a_bad_network_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latency, loss and resets all the time; in the second round one site is deaf, and one is cut for two seconds."""
    monkeypatch.setattr(remote, "SLACK", 1.0)
    study = study_of(get("scaffold"), BENCHES["2D"], every=1, rounds=3)
    between = Between(study, tmp_path)
    networks: dict[str, Proxy] = {}

    def bad(what: str, value: Any) -> None:
        if (what, value) == ("round", 2):
            networks["bergen"].deaf = True
            networks["cairo"].cut()
            threading.Timer(2.0, lambda: [networks[name].mend() for name in ("bergen", "cairo")]).start()

    with ExitStack() as stack:
        for seed, name in enumerate(study.names):
            far, near = tmp_path / f"far-{name}", tmp_path / f"near-{name}"
            far.mkdir()
            near.mkdir()
            door = Door(far, lambda header, body, name=name: between.desks[name].handle(body))  # type: ignore[misc]
            stack.callback(door.close)
            told = json.loads((far / FILE).read_text())
            networks[name] = proxy = Proxy(told["port"], seed)
            stack.callback(proxy.close)
            (near / FILE).write_text(json.dumps({**told, "port": proxy.port}))
            proxy.latency, proxy.loss = 0.01, 0.05
            proxy.flaky(0.3)
        there = between.run(
            Doors({name: tmp_path / f"near-{name}" for name in study.names}),
            run_with={"watch": bad},
            lease=60.0,
            patience=1.0,
        )
        assert sum(network.resets for network in networks.values()) > 3
    assert same(there, run(study, tmp_path / "local"))
    assert record(tmp_path / "run") == record(tmp_path / "local")
