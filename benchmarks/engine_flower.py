"""Flower as carrier against Flower by itself: the same bytes to a site and back, by turns, in one run.

Bare Flower is a SuperLink, a SuperNode and an app that echoes an array by ``grid.send_and_receive``, without TLS. The
relay carries the same bytes by ``Relayed.call``, over mutual TLS; large ones in parts, there and then back, one after
the other, as ``engines.remote`` sends them.

    python benchmarks/engine_flower.py [--pairs 7] [--large 512] [--parts 8 16 32 64] [--repeat 2]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedscan.consortium import coordinator, member
from fedscan.engines import flower
from fedscan.engines.doors import Door, Knock, Lost, Relayed

MB = 1 << 20
BARE = """
import os, time
from pathlib import Path
from threading import Event
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedscan.engines.doors import Door

server = ServerApp()
client = ClientApp()

@client.query()
def echo(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    def answer(header, body):
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.1)
        data = os.urandom(header["length"])
        begun = time.perf_counter()
        content = RecordDict({"a": ArrayRecord({"a": Array("uint8", (len(data),), "raw", data)})})
        (reply,) = grid.send_and_receive([Message(content, dst_node_id=nodes[0], message_type="query")])
        seconds = time.perf_counter() - begun
        assert bytes(reply.content["a"]["a"].data) == data
        return str(seconds).encode()
    Door(Path(os.environ["BARE_DOOR"]), answer)
    Event().wait()
"""
APP = """[project]
name = "bare"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "bare_app:server"
clientapp = "bare_app:client"
"""


def free_port() -> int:
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def bare(folder: Path) -> Iterator[Callable[[int], float]]:
    """Flower by itself: a call that says how many seconds so many bytes took there and back."""
    port, app, home = free_port(), folder / "app", folder / "flwr"
    app.mkdir(parents=True)
    home.mkdir()
    (app / "bare_app.py").write_text(BARE)
    (app / "pyproject.toml").write_text(APP)
    where = f'[superlink]\ndefault = "bare"\n[superlink.bare]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(where)
    binaries = Path(flower.python()).parent
    env = {**os.environ, **flower.QUIET, "PATH": f"{binaries}:{os.environ['PATH']}", "FLWR_HOME": str(home)}
    env["BARE_DOOR"] = str(folder)
    at = ["--insecure", "--host", "127.0.0.1", "--port"]
    commands = [
        ["flower-superlink", *at, str(port)],
        ["flower-supernode", "--superlink", f"127.0.0.1:{port}", *at, str(free_port())],
    ]
    with (folder / "log.txt").open("wb") as log:
        running = [subprocess.Popen([binaries / c[0], *c[1:]], env=env, stdout=log, stderr=log) for c in commands]
        try:
            waiting(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close())
            subprocess.run([binaries / "flwr", "run", app, "bare"], env=env, stdout=log, stderr=log, check=True)
            knock = Knock(folder)
            waiting(lambda: knock.call({"length": 1}, b"", 60.0))
            yield lambda length: float(knock.call({"length": length}, b"", 900.0))
        finally:
            with suppress(OSError, ValueError):
                os.kill(int(json.loads((folder / "door.json").read_text())["pid"]), 9)
            for process in reversed(running):
                process.terminate()
            for process in running:
                process.wait(30)


def waiting(call: Callable[[], object], seconds: float = 120.0) -> None:
    """Calls until it does not fail."""
    until = time.monotonic() + seconds
    while True:
        try:
            call()
            return
        except (OSError, Lost):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


@contextmanager
def relayed(folder: Path) -> Iterator[Callable[[bytes], bytes]]:
    """fedscan over Flower: a call to one site, which echoes what is short, and takes or gives what is asked for."""
    root = folder / "root"
    coordinator.found("bench", root)
    homes = {}
    for name, role in (("site", "site"), ("hub", "coordinator")):
        homes[name] = member.begin(name, role, folder / name)
        coordinator.admit(root, folder / name / "request.csr", role)
        member.take_kit(homes[name], root / "kits" / name)
    port, kept = free_port(), os.urandom(64 * MB)

    def answer(header: dict[str, object], body: bytes) -> bytes:
        match body[:5]:
            case b"take ":
                return b"taken"
            case b"give ":
                return kept[: int(body[5:])]
        return body

    at = folder / "door"
    at.mkdir()
    door = Door(at, answer)
    hub = flower.coordinator(homes["hub"], folder / "engine-hub", port, "localhost")
    site = flower.site(homes["site"], folder / "engine-site", f"localhost:{port}", "hub", at)
    carrier = Relayed(folder / "engine-hub")
    with hub, site:
        waiting(lambda: carrier.call("site", b"hello", 30.0))
        yield lambda request: carrier.call("site", request, 300.0)
    door.close()


def in_parts(call: Callable[[bytes], bytes], length: int, part: int) -> float:
    """Seconds in which so many bytes go to the site in parts, and come back in parts."""
    begun, data = time.perf_counter(), b"take " + os.urandom(part)
    for _ in range(0, length, part):
        assert call(data) == b"taken"
    for _ in range(0, length, part):
        assert len(call(f"give {part}".encode())) == part
    return time.perf_counter() - begun


def told(what: str, ours: list[float], theirs: list[float]) -> None:
    """Prints medians, and the ratio of each pair: median, least and most."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(
        f"{what}: relay {statistics.median(ours):.2f} s, bare {statistics.median(theirs):.2f} s, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)",
        flush=True,
    )


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--large", type=int, default=512, help="MiB; 0 leaves it out")
    parser.add_argument("--parts", type=int, nargs="*", default=[8, 16, 32, 64], help="MiB")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        bare(Path(temporary) / "bare") as by_itself,
        relayed(Path(temporary) / "relay") as call,
    ):
        ours, theirs = [], []
        for _ in range(args.pairs):
            request, begun = os.urandom(MB), time.perf_counter()
            assert call(request) == request
            ours.append(time.perf_counter() - begun)
            theirs.append(by_itself(MB))
        told("1 MiB there and back", ours, theirs)
        if args.large:
            whole = args.large * MB
            times: dict[int, list[float]] = {part: [] for part in args.parts}
            bares = []
            for _ in range(args.repeat):
                bares.append(by_itself(whole))
                for part, found in times.items():
                    found.append(in_parts(call, whole, part * MB))
                    print(f"  bare {bares[-1]:.1f} s; in parts of {part} MiB {found[-1]:.1f} s", flush=True)
            for part, found in times.items():
                told(f"{args.large} MiB there and back, parts of {part} MiB", found, bares)


if __name__ == "__main__":
    main()
