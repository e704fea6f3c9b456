"""Flower's processes as carrier: what comes through, who is let in, and what goes on when they are killed."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedscan.consortium import coordinator, member
from fedscan.consortium.member import Home
from fedscan.engines import flower
from fedscan.engines.doors import Door, Lost, Relayed
from fedscan.engines.flower import Engine

SITES = ("hospital-a", "hospital-b")


def member_of(root: Path, folder: Path, name: str, role: str) -> Home:
    home = member.begin(name, role, folder)
    coordinator.admit(root, folder / "request.csr", role)
    member.take_kit(home, root / "kits" / name)
    return home


def world(folder: Path, *sites: str) -> dict[str, Home]:
    """A consortium; its coordinator is admitted last, and so knows all others."""
    coordinator.found("glioma", folder / "root")
    roles = {**dict.fromkeys(sites, "site"), "hub": "coordinator"}
    return {name: member_of(folder / "root", folder / name, name, role) for name, role in roles.items()}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def processes(folder: Path) -> dict[int, list[str]]:
    """What runs on behalf of a folder, by number: command lines, and the number of the parent first."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mine = path.name != str(os.getpid()) and str(folder).encode() in (path / "environ").read_bytes()
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if mine and state != "Z":
                found[int(path.name)] = [parent, *(path / "cmdline").read_text().split("\0")]
    return found


def eventually(call: Callable[[], bytes], seconds: float = 90.0) -> bytes:
    """What a caller gets that repeats what is lost."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Lost:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@dataclass
class Net:
    """A coordinator and two sites; each site's door says its name and the request, backwards."""

    folder: Path
    homes: dict[str, Home]
    port: int
    engines: dict[str, Engine] = field(default_factory=dict)
    doors: dict[str, Door] = field(default_factory=dict)
    pause: float = 0.0  # seconds that a site takes to answer

    def door(self, name: str) -> Path:
        path = self.folder / f"door-{name}"
        path.mkdir(exist_ok=True)
        return path

    def open(self, name: str) -> None:
        def answer(_: dict[str, object], body: bytes) -> bytes:
            time.sleep(self.pause)
            return name.encode() + body[::-1]

        self.doors[name] = Door(self.door(name), answer)

    def call(self, name: str, request: bytes, seconds: float = 30.0) -> bytes:
        return Relayed(self.folder / "engine-hub").call(name, request, seconds)

    def echo(self, name: str, length: int = 1 << 10) -> None:
        """Asks until there is an answer, which has to be right."""
        request = os.urandom(length)
        assert eventually(lambda: self.call(name, request)) == name.encode() + request[::-1]

    def kill(self, member: str, command: str) -> int:
        """Kills -9 the process of a member whose command line holds the word."""
        running = processes(self.folder / f"engine-{member}")
        (pid,) = [pid for pid, (_, *line) in running.items() if any(command in word for word in line[:3])]
        os.kill(pid, signal.SIGKILL)
        return pid


@pytest.fixture(scope="module")
def installed() -> str:
    try:
        return flower.python()
    except ValueError as e:
        pytest.skip(f"needs an environment with Flower: {e}")


@pytest.fixture(scope="module")
def net(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    folder = tmp_path_factory.mktemp("flower")
    net = Net(folder, world(folder, *SITES), free_port())
    net.engines["hub"] = flower.coordinator(net.homes["hub"], folder / "engine-hub", net.port, "localhost")
    for name in SITES:
        net.open(name)
        where = (f"localhost:{net.port}", "hub", net.door(name))
        net.engines[name] = flower.site(net.homes[name], folder / f"engine-{name}", *where)
    for engine in net.engines.values():
        engine.__enter__()
    try:
        for name in SITES:
            net.echo(name)
        yield net
    finally:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(Engine.stop, net.engines.values()))
    assert processes(folder) == {}  # nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1 << 10, 8 << 20])
def test_bytes_come_back_as_they_were_sent(net: Net, length: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: net.echo(name, length), SITES))
    assert flower.connected(net.folder / "engine-hub") == list(SITES)


@pytest.mark.slow
def test_sites_are_asked_at_once_and_answers_are_not_swapped(net: Net) -> None:
    net.pause = 4.0
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: net.echo(SITES[n], 1000 + n), range(2)))
    net.pause = 0.0
    assert time.monotonic() - begun < 7.9  # one after the other they take eight seconds and more


@pytest.mark.slow
def test_what_is_lost_says_why(net: Net) -> None:
    net.pause = 4.0
    with pytest.raises(Lost, match="nothing came from hospital-a within 1 s"):
        net.call("hospital-a", b"1", seconds=1.0)
    net.pause = 0.0
    with pytest.raises(Lost, match="hospital-x has not joined yet"):
        net.call("hospital-x", b"1", seconds=1.0)
    (net.door("hospital-b") / "door.json").unlink()
    with pytest.raises(Lost, match="nobody is there yet"):
        net.call("hospital-b", b"1", seconds=8.0)
    net.open("hospital-b")
    net.echo("hospital-b")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("member", "command"),
    [
        ("hub", "flwr-serverapp"),
        ("hub", "flower-superlink"),
        ("hub", "flower-superexec"),
        ("hospital-a", "flower-supernode"),
        ("hospital-a", "flower-superexec"),
        ("hospital-b", "--quick"),
        ("hub", "flower_keeper"),
        ("hospital-b", "flower_keeper"),
    ],
)
def test_calls_go_on_where_a_process_is_killed_in_the_middle_of_them(net: Net, member: str, command: str) -> None:
    net.pause = 0.5
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(net.echo, name, 1 << 20) for name in SITES * 2]
        time.sleep(0.5)
        net.kill(member, command)
        for call in calls:
            call.result()
    net.pause = 0.0
    for name in SITES:
        net.echo(name)
