"""NVFlare's processes as carrier: what comes through, who is let in, and what goes on when they are killed."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedscan.consortium import coordinator, member
from fedscan.consortium.member import Home
from fedscan.engines import nvflare
from fedscan.engines.doors import Door, Lost, Relayed
from fedscan.engines.kept import heard, sites_connected
from fedscan.engines.nvflare import Engine

SITES = ("hospital-a", "hospital-b")


def member_of(root: Path, folder: Path, name: str, role: str) -> Home:
    home = member.begin(name, role, folder)
    coordinator.admit(root, folder / "request.csr", role)
    member.take_kit(home, root / "kits" / name)
    return home


def world(folder: Path, *sites: str) -> dict[str, Home]:
    coordinator.found("glioma", folder / "root")
    roles = {"hub": "coordinator", **dict.fromkeys(sites, "site")}
    return {name: member_of(folder / "root", folder / name, name, role) for name, role in roles.items()}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def processes_of(folder: Path) -> list[str]:
    """The command lines that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def eventually(call: Callable[[], bytes], seconds: float = 60.0) -> bytes:
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
    engines: dict[str, Engine]
    doors: dict[str, Door]
    port: int
    pause: float = 0.0  # seconds that a site takes to answer
    together: threading.Barrier | None = None

    def door(self, name: str) -> Path:
        path = self.folder / f"door-{name}"
        path.mkdir(exist_ok=True)
        return path

    def open(self, name: str) -> None:
        def answer(_: dict[str, object], body: bytes) -> bytes:
            time.sleep(self.pause)
            if self.together is not None:
                self.together.wait()
            return name.encode() + body[::-1]

        self.doors[name] = Door(self.door(name), answer)

    def call(self, name: str, request: bytes, seconds: float = 20.0) -> bytes:
        return bytes(Relayed(self.folder / "engine-hub").call(name, request, seconds))

    def echo(self, name: str, length: int = 1 << 10) -> None:
        """Asks until there is an answer, which has to be right."""
        request = os.urandom(length)
        assert eventually(lambda: self.call(name, request)) == name.encode() + request[::-1]

    def kill(self, name: str) -> None:
        os.kill(self.engines[name].pid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def installed() -> str:
    try:
        return nvflare.python()
    except ValueError as e:
        pytest.skip(f"needs an environment with NVFlare: {e}")


@pytest.fixture(scope="module")
def net(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    folder = tmp_path_factory.mktemp("nvflare")
    homes, port = world(folder, *SITES, "hospital-c"), free_port()
    net = Net(folder, homes, {}, {}, port)
    net.engines["hub"] = nvflare.coordinator(homes["hub"], folder / "engine-hub", port, "localhost")
    for name in SITES:
        net.open(name)
        net.engines[name] = nvflare.site(
            homes[name], folder / f"engine-{name}", f"localhost:{port}", "hub", net.door(name)
        )
    for engine in net.engines.values():
        engine.__enter__()
    try:
        for name in SITES:
            net.echo(name)
        yield net
    finally:
        for engine in net.engines.values():
            engine.stop()
    assert processes_of(folder) == []  # nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1 << 10, 8 << 20])
def test_bytes_come_back_as_they_were_sent(net: Net, length: int) -> None:
    for name in SITES:
        net.echo(name, length)
    assert sites_connected(net.folder / "engine-hub") == list(SITES)


@pytest.mark.slow
def test_sites_are_asked_at_once_and_answers_are_not_swapped(net: Net) -> None:
    net.together = threading.Barrier(6, timeout=60)  # nobody answers until six have been asked
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda n: net.echo(SITES[n % 2], 1000 + n), range(12)))
    net.together = None


@pytest.mark.slow
def test_much_both_ways_at_once_goes_over_one_connection(net: Net) -> None:
    """One thread writes while another reads, on one connection of TLS: neither may break it for the other."""
    log, name = net.folder / "engine-hub" / "log.txt", SITES[0]
    before = log.read_text().count("is created")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: net.echo(name, 8 << 20), range(40)))
    assert log.read_text().count("is created") == before


@pytest.mark.slow
def test_who_says_nothing_in_time_is_named(net: Net) -> None:
    net.pause = 4.0
    with pytest.raises(Lost, match=r"nothing was said within|hospital-a was not reached within"):
        net.call("hospital-a", b"1", seconds=1.0)
    with pytest.raises(Lost, match=r"hospital-x was not reached within 0\.5 s: it is not connected"):
        net.call("hospital-x", b"1", seconds=0.5)
    net.pause = 0.0


@pytest.mark.slow
def test_a_site_whose_join_starts_again_is_waited_for(net: Net) -> None:
    net.doors.pop("hospital-a").close()
    later = threading.Timer(1.0, net.open, ["hospital-a"])
    later.start()
    net.echo("hospital-a")
    later.join()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["hub", "hospital-a", "hospital-b"])
def test_calls_go_on_where_a_process_is_killed_in_the_middle_of_them(net: Net, whom: str) -> None:
    before = net.engines[whom].pid()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(net.echo, name, 4 << 20) for name in SITES * 6]
        time.sleep(0.3)
        net.kill(whom)
        for call in calls:
            call.result()
    assert net.engines[whom].pid() != before


@pytest.mark.slow
def test_a_call_over_a_connection_that_is_gone_is_made_again_within_its_seconds(net: Net) -> None:
    net.pause = 3.0
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(net.call, "hospital-a", b"abc", 90.0)
        time.sleep(0.5)
        net.kill("hospital-a")
        assert call.result() == b"hospital-acba"
    net.pause = 0.0


@pytest.mark.slow
def test_processes_hold_no_torch_and_no_secret_in_sight(net: Net) -> None:
    for name, engine in net.engines.items():
        process = Path(f"/proc/{engine.pid()}")
        assert "torch" not in (process / "maps").read_text()
        environment = dict(pair.split("=", 1) for pair in (process / "environ").read_text().split("\0") if pair)
        assert set(environment) <= {
            *nvflare.KEPT,
            *nvflare.LEAN,
            "HOME",
            "OMP_NUM_THREADS",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "LC_CTYPE",
        }
        assert environment["SSL_CERT_FILE"] == str(net.homes[name].folder / "root.pem")
        written = [path.read_text(errors="replace") for path in engine.folder.rglob("*") if path.is_file()]
        assert not any("PRIVATE" in text for text in written)
        secret = net.homes[name].folder.joinpath("key.pem").read_text().splitlines()[1]
        assert not any(secret in text for text in written)


def handshake(net: Net, *, home: Home | None, port: int = 0) -> None:
    """Speaks TLS with the coordinator's server (or another port), as this member or as nobody."""
    context = ssl.create_default_context(cafile=str(net.homes["hub"].folder / "root.pem"))
    context.check_hostname = False
    if home is not None:
        context.load_cert_chain(home.folder / "certificate.pem", home.folder / "key.pem")
    with (
        socket.create_connection(("127.0.0.1", port or net.port), timeout=5.0) as plain,
        context.wrap_socket(plain) as sock,
    ):
        sock.settimeout(1.0)
        with suppress(TimeoutError):  # it waits for what is said: let in
            assert sock.recv(1) != b"", "the server hung up"


def listening_ports(pid: int) -> set[int]:
    """The TCP ports on which a process listens."""
    own = {os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


@pytest.mark.slow
def test_no_port_opens_without_a_certificate(net: Net) -> None:
    for name, engine in net.engines.items():
        doors = [json.loads((folder / "door.json").read_text())["port"] for folder in [engine.folder] if name == "hub"]
        ports = listening_ports(engine.pid()) - set(doors)  # a door of ours asks for its token
        assert (net.port in ports) == (name == "hub")
        assert len(ports) == (2 if name == "hub" else 1)  # NVFlare opens one on loopback for jobs
        for port in ports:
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                handshake(net, home=None, port=port)


@pytest.mark.slow
def test_silent_callers_keep_nobody_out(net: Net) -> None:
    silent = [socket.create_connection(("127.0.0.1", net.port)) for _ in range(50)]
    handshake(net, home=net.homes["hospital-c"])
    net.echo("hospital-a")
    for sock in silent:
        sock.close()


@pytest.mark.slow
def test_nobody_gets_in_without_a_certificate_of_the_root(net: Net, tmp_path: Path) -> None:
    other = world(tmp_path / "other", "hospital-c")["hospital-c"]
    handshake(net, home=net.homes["hospital-c"])
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        handshake(net, home=None)
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        handshake(net, home=other)


@dataclass(frozen=True)
class Posing:
    """A member's folder, under another name than that of its certificate."""

    home: Home
    name: str
    role: str = "site"
    consortium: str = "glioma"

    @property
    def folder(self) -> Path:
        return self.home.folder

    def identity(self) -> object:
        return None


@pytest.mark.slow
def test_a_site_cannot_pose_as_another_nor_as_the_coordinator(net: Net, tmp_path: Path) -> None:
    stolen = tmp_path / "door"
    stolen.mkdir()
    door = Door(stolen, lambda header, body: b"stolen")
    posing = nvflare.site(
        Posing(net.homes["hospital-c"], "hospital-d"), tmp_path / "posing", f"localhost:{net.port}", "hub", stolen
    )
    port = free_port()
    lure = nvflare.coordinator(
        Posing(net.homes["hospital-c"], "hub", "coordinator"), tmp_path / "lure", port, "localhost"
    )
    lured = nvflare.site(net.homes["hospital-c"], tmp_path / "lured", f"localhost:{port}", "hub", stolen)
    with posing, lure, lured:
        refused = "authenticated as 'hospital-c' but claimed endpoint 'hospital-d'"
        for log, words in {net.folder / "engine-hub": refused, tmp_path / "lured": "certificate verify failed"}.items():
            until = time.monotonic() + 60
            while not (log / "log.txt").exists() or words not in (log / "log.txt").read_text():
                assert time.monotonic() < until, f"{log.name} never said: {words}"
                time.sleep(0.2)
        with pytest.raises(Lost, match="not connected"):
            net.call("hospital-d", b"1", seconds=1.0)
        assert sites_connected(net.folder / "engine-hub") == list(SITES)
        assert sites_connected(tmp_path / "lure") == []
        assert heard(tmp_path / "posing") is heard(tmp_path / "lured") is None
    door.close()


OWNER = """
import sys, time
from pathlib import Path
from fedscan.engines.nvflare import Engine
with Engine(Path(sys.argv[1])):
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_process_outlives_its_owner_and_the_next_takes_it_over(net: Net, tmp_path: Path) -> None:
    engine = nvflare.coordinator(net.homes["hub"], tmp_path / "hub", free_port(), "localhost")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(engine.folder)])
    while sites_connected(engine.folder) or not (engine.folder / "door.json").exists():
        time.sleep(0.1)
    owner.kill()
    owner.wait()
    kept = engine.pid()
    with engine:
        time.sleep(1.0)
        assert engine.running()
        assert engine.pid() == kept
        assert json.loads((engine.folder / "door.json").read_text())["pid"] == kept
        port = json.loads((engine.folder / "member.json").read_text())["port"]
        second = nvflare.coordinator(net.homes["hub"], tmp_path / "second", port, "localhost")
        with pytest.raises(ValueError, match="in use by another process"):
            second.__enter__()
    assert processes_of(tmp_path) == []


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = world(tmp_path, "hospital-a", "server")
    with pytest.raises(ValueError, match="only a coordinator can serve"):
        nvflare.coordinator(homes["hospital-a"], tmp_path / "x", 8002)
    with pytest.raises(ValueError, match="the name 'server'"):
        nvflare.site(homes["server"], tmp_path / "x", "hub.org:8002", "hub", tmp_path)
    for address in ("hub.org", ":8002", "hub.org:", "hub.org:http"):
        with pytest.raises(ValueError, match="is not an address and a port"):
            nvflare.site(homes["hospital-a"], tmp_path / "x", address, "hub", tmp_path)
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("FEDSCAN_NVFLARE_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere, which does not exist"):
        nvflare.coordinator(homes["hub"], tmp_path / "x", 8002).__enter__()


def test_the_start_up_folder_names_the_key_where_it_lies_and_holds_no_copy(tmp_path: Path) -> None:
    home = world(tmp_path, "hospital-a")["hospital-a"]
    engine = nvflare.site(home, tmp_path / "engine", "hub.org:8002", "hub", tmp_path / "door")
    client = json.loads((engine.folder / "startup" / "fed_client.json").read_text())["client"]
    assert client["ssl_private_key"] == str(home.folder / "key.pem")
    assert client["connection_security"] == "mtls"
    assert engine.folder.stat().st_mode & 0o077 == 0
    assert not any(b"PRIVATE" in path.read_bytes() for path in engine.folder.rglob("*") if path.is_file())
    assert not engine.running()
    engine.stop()  # of what does not run: nothing
