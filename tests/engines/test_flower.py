"""Flower's processes as carrier: what comes through, who is let in, and what goes on when they are killed."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from fedscan.consortium import coordinator, member
from fedscan.consortium.member import Home
from fedscan.engines import flower
from fedscan.engines.doors import Door, Lost, Relayed
from fedscan.engines.flower import Engine
from fedscan.engines.flower_gate import Closed, Front, Gate, Head, certified, connected, to_coordinator
from fedscan.engines.kept import sites_connected

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


def eventually(call: Callable[[], bytes], seconds: float = 240.0) -> bytes:
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
    meet: threading.Barrier | None = None

    def door(self, name: str) -> Path:
        path = self.folder / f"door-{name}"
        path.mkdir(exist_ok=True)
        return path

    def open(self, name: str) -> None:
        def answer(_: dict[str, object], body: bytes) -> bytes:
            time.sleep(self.pause)
            if self.meet:
                self.meet.wait(60.0)
            return name.encode() + body[::-1]

        self.doors[name] = Door(self.door(name), answer)

    def call(self, name: str, request: bytes, seconds: float = 30.0) -> bytes:
        return bytes(Relayed(self.folder / "engine-hub").call(name, request, seconds))

    def echo(self, name: str, length: int = 1 << 10) -> None:
        """Asks until there is an answer, which has to be right."""
        request = os.urandom(length)
        assert eventually(lambda: self.call(name, request)) == name.encode() + request[::-1]

    def running(self, member: str, command: str) -> list[int]:
        """The processes of a member whose command line holds the word: those that were started, then their forks."""
        found = {
            pid: int(parent)
            for pid, (parent, *line) in processes(self.folder / f"engine-{member}").items()
            if any(command in word for word in line[:4])
        }
        return sorted(found, key=lambda pid: (found[pid] in found, pid))

    def kill(self, member: str, command: str, fork: bool = False) -> None:
        """Kills -9 the process of a member that has the word in its command line, or the last fork of it."""
        until = time.monotonic() + 30
        while len(pids := self.running(member, command)) < 1 + fork:
            assert time.monotonic() < until, f"no {command} runs at {member}"
            time.sleep(0.1)
        os.kill(pids[-1] if fork else pids[0], signal.SIGKILL)


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
    assert sites_connected(net.folder / "engine-hub") == list(SITES)


@pytest.mark.slow
def test_sites_are_asked_at_once_and_answers_are_not_swapped(net: Net) -> None:
    net.meet = threading.Barrier(2)  # neither answers before the other was asked
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: net.echo(SITES[n], 1000 + n), range(2)))
    net.meet = None


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
    "killed",
    [
        "hub flwr-serverapp, hospital-a --node",
        "hub flower-superlink",
        "hub flower-superexec, hospital-a flower-superexec, hospital-b --quick",
        "hospital-a fork-of--quick",
        "hub flower_keeper, hospital-b flower_keeper",
    ],
)
def test_calls_go_on_where_processes_are_killed_in_the_middle_of_them(net: Net, killed: str) -> None:
    net.pause = 0.5
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(net.echo, name, 1 << 20) for name in SITES * 2]
        time.sleep(0.5)
        for member, command in (words.split() for words in killed.split(", ")):
            net.kill(member, command.removeprefix("fork-of"), command.startswith("fork-of"))
        for call in calls:
            call.result()
    net.pause = 0.0
    for name in SITES:
        net.echo(name)


@pytest.mark.slow
def test_processes_hold_no_torch_and_no_secret_in_sight(net: Net) -> None:
    for name, engine in net.engines.items():
        for pid in processes(engine.folder):
            with suppress(OSError):
                assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
        written = [path.read_text(errors="replace") for path in engine.folder.rglob("*") if path.is_file()]
        secret = net.homes[name].folder.joinpath("key.pem").read_text().splitlines()[1]
        assert written
        assert not any(secret in text or "PRIVATE" in text for text in written)


@pytest.mark.slow
def test_only_the_gate_listens_beyond_loopback_and_takes_no_orders(net: Net) -> None:
    assert spoken(net.port, net.homes["hospital-a"], "/v1/control/list-runs") == "403"
    assert spoken(net.port, net.homes["hospital-a"], "/v1/runtime/acquire-task") == "403"
    assert spoken(net.port, net.homes["hospital-a"], "/docs") == "403"
    assert spoken(net.port, net.homes["hospital-a"], "/v1/fleet/pull-messages") == "401"  # it has no node of that key
    net.echo("hospital-a")


OWNER = """
import sys, time
from pathlib import Path
from fedscan.engines.flower import Engine
from fedscan.engines.flower_gate import Closed, Front, Gate, Head, certified, connected, to_coordinator
with Engine(Path(sys.argv[1])):
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_processes_outlive_their_owner_and_the_next_takes_them_over(net: Net, tmp_path: Path) -> None:
    engine = flower.coordinator(net.homes["hub"], tmp_path / "hub", free_port(), "localhost")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(engine.folder)])
    while not (engine.folder / "gate" / "door.json").exists():
        time.sleep(0.1)
    owner.kill()
    owner.wait()
    kept = engine.pid()
    with engine:
        time.sleep(1.0)
        assert engine.running()
        assert engine.pid() == kept
        port = json.loads((engine.folder / "member.json").read_text())["listen"][1]
        second = flower.coordinator(net.homes["hub"], tmp_path / "second", port, "localhost")
        with pytest.raises(ValueError, match="in use by another process"):
            second.__enter__()
    assert processes(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ({"pyproject.toml": "", ".info/CONTENT": ""}, True),
        ({"pyproject.toml": "", ".info/CONTENT": "", "flower.py": "print(1)"}, False),
        ({"pyproject.toml": "[project]\nname = 'other'\n", ".info/CONTENT": ""}, False),
        ({".info/CONTENT": ""}, False),
    ],
)
def test_no_code_is_taken_from_flower(installed: str, tmp_path: Path, files: dict[str, str], taken: bool) -> None:
    script = """
import sys
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from fedscan.engines.flower_keeper import without_code
content = open(sys.argv[1], "rb").read()
print(without_code(GetFabResponse(fab=Fab(hash_str="1", content=content)).SerializeToString()))
"""
    app = "import fedscan.engines.flower_keeper as k; print(k.APP)"
    ours = subprocess.run([installed, "-c", app], capture_output=True, text=True, check=True).stdout
    with zipfile.ZipFile(tmp_path / "bundle", "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text or ours)
    said = subprocess.run([installed, "-c", script, tmp_path / "bundle"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(taken)


# -- the gate, without Flower ------------------------------------------------------------------------------------------


def spoken(port: int, home: Home | None, path: str, key: str = "key", body: bytes = b"") -> str:
    """The status that a gate answers, or what it said besides; "" where it hangs up. As a member, or as nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if home is not None:
        context.load_cert_chain(home.folder / "certificate.pem", home.folder / "key.pem")
    head = f"POST {path} HTTP/1.1\r\nflwr-public-key: {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    with (
        suppress(ssl.SSLError, ConnectionError),
        socket.create_connection(("127.0.0.1", port), timeout=30.0) as plain,
        context.wrap_socket(plain) as sock,
    ):
        sock.sendall(head.encode() + body)
        answer = sock.recv(4096).decode()
        return answer.split(" ")[1] if answer else ""
    return ""


class Link(BaseHTTPRequestHandler):
    """Stands in for a SuperLink: notes what is asked, and echoes."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Guarded:
    homes: dict[str, Home]
    front: Front
    gate: Gate

    def ask(self, name: str, act: str, key: str = "key", body: bytes = b"") -> str:
        return spoken(self.gate.port, self.homes[name], f"/v1/fleet/{act}", key, body)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    homes = world(tmp_path, *SITES)
    names = {m.certificate: m.name for m in homes["hub"].roster.members.values() if m.name == "hospital-a"}
    front, link = Front(names), ThreadingHTTPServer(("127.0.0.1", 0), Link)
    threading.Thread(target=link.serve_forever, daemon=True).start()
    dial = lambda: connected(("127.0.0.1", link.server_port))  # noqa: E731
    context = certified(homes["hub"].folder, server=True)
    Link.asked.clear()
    gate = Gate(("127.0.0.1", 0), dial, context=context, who=front.who, held=front.held)
    yield Guarded(homes, front, gate)
    gate.close()
    link.shutdown()


def test_the_gate_lets_in_members_that_it_was_told_of_and_nobody_else(guarded: Guarded, tmp_path: Path) -> None:
    assert guarded.ask("hospital-a", "register-node") == "200"
    stranger = world(tmp_path / "other", "hospital-a")["hospital-a"]
    Link.asked.clear()
    assert spoken(guarded.gate.port, None, "/v1/fleet/register-node") == ""
    assert spoken(guarded.gate.port, stranger, "/v1/fleet/register-node") == ""
    assert guarded.ask("hospital-b", "register-node") == "403"  # of the consortium, and not on the roster of this study
    assert guarded.ask("hub", "register-node") == "403"
    guarded.front.members = {}
    assert guarded.ask("hospital-a", "register-node") == "403"  # revoked
    assert Link.asked == []


def test_the_gate_passes_what_a_node_asks_and_no_orders(guarded: Guarded) -> None:
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/../control/start-run", "/docs", "*"):
        assert spoken(guarded.gate.port, guarded.homes["hospital-a"], path) == "403"
    assert Link.asked == []


def test_a_site_has_one_node_and_an_earlier_one_is_sent_away(guarded: Guarded) -> None:
    assert guarded.ask("hospital-a", "get-run", "first") == "401"
    assert guarded.ask("hospital-a", "activate-node", "first") == "200"
    assert guarded.ask("hospital-a", "get-run", "first") == "200"
    assert guarded.ask("hospital-a", "activate-node", "second") == "200"
    assert guarded.ask("hospital-a", "get-run", "first") == "401"
    assert guarded.front.since(0, 0.0) == {"news": 2, "said": ["hospital-a"], "nodes": {"hospital-a": "second"}}


def test_a_node_that_asks_for_messages_waits_until_there_is_one(guarded: Guarded) -> None:
    guarded.ask("hospital-a", "activate-node")
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(guarded.ask, "hospital-a", "pull-messages")
        with pytest.raises(TimeoutError):
            pull.result(0.3)
        guarded.front.sent("hospital-a")
        assert pull.result(5.0) == "200"
        guarded.front.sent("hospital-a")  # one that was sent before it is asked for
        assert pool.submit(guarded.ask, "hospital-a", "pull-messages").result(5.0) == "200"


def test_news_of_a_site_come_when_all_that_it_says_has_come(guarded: Guarded) -> None:
    guarded.ask("hospital-a", "activate-node")
    guarded.ask("hospital-a", "push-messages")
    guarded.ask("hospital-a", "push-object", body=b"1" * 100_000)
    assert guarded.front.since(1, 0.1)["said"] == []
    guarded.front.sent("hospital-a")
    guarded.ask("hospital-a", "pull-messages")
    assert guarded.front.since(1, 5.0)["said"] == ["hospital-a"]


def test_what_was_lost_with_a_superlink_comes_anew(guarded: Guarded) -> None:
    guarded.ask("hospital-a", "activate-node")
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(guarded.ask, "hospital-a", "pull-messages")
        time.sleep(0.3)
        guarded.front.forget()
        assert pull.result(5.0) == "401"  # at which Flower's node ends itself


@pytest.mark.parametrize("text", ["GET\r\n\r\n", "POST /a HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
                                  "POST /a HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"])  # fmt: skip
def test_heads_of_which_the_length_is_not_plain_are_not_passed_on(text: str) -> None:
    with pytest.raises(Closed):
        Head(text.encode())


def test_a_site_talks_to_the_coordinator_only(guarded: Guarded, tmp_path: Path) -> None:
    address, context = ("127.0.0.1", guarded.gate.port), certified(guarded.homes["hospital-a"].folder)
    to_coordinator(address, "hub", context)().close()
    with pytest.raises(ssl.SSLCertVerificationError):
        to_coordinator(address, "another", context)()
    posing = Gate(("127.0.0.1", 0), socket.socket, context=certified(guarded.homes["hospital-b"].folder, server=True))
    with pytest.raises(ssl.SSLCertVerificationError):
        to_coordinator(("127.0.0.1", posing.port), "hospital-b", context)()  # a site's certificate serves nobody
    posing.close()


def test_a_running_engine_is_told_whom_the_roster_names_now(tmp_path: Path) -> None:
    homes = world(tmp_path, *SITES)

    def told() -> list[str]:
        engine = flower.coordinator(member.read(homes["hub"].folder), tmp_path / "engine", 8002)
        return sorted(json.loads((engine.folder / "member.json").read_text())["sites"].values())

    assert told() == list(SITES)
    coordinator.revoke(tmp_path / "root", "hospital-a", "it has left")
    member.take_roster(homes["hub"], tmp_path / "root" / "roster.json")
    assert told() == ["hospital-b"]


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = world(tmp_path, "hospital-a")
    with pytest.raises(ValueError, match="only a coordinator can serve"):
        flower.coordinator(homes["hospital-a"], tmp_path / "engine", 8002)
    with pytest.raises(ValueError, match="is not an address and a port"):
        flower.site(homes["hospital-a"], tmp_path / "engine", "hospital.org", "hub", tmp_path)
    flower.hold_size("the model", 2 << 30)
    with pytest.raises(ValueError, match=r"the model has 4\.5 GiB, and the Flower engine carries 2 GiB at most"):
        flower.hold_size("the model", 9 << 29)
    monkeypatch.setenv("FEDSCAN_FLOWER_PYTHON", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"names .*none, which does not exist"):
        flower.python()
