"""fedscan over Flower against Flower by itself: the same bytes to a site and back, by turns, in one run.

Bare Flower is a SuperLink, a SuperNode and an app that echoes an array by ``grid.send_and_receive``, without TLS.
fedscan asks a site for an echo of weights as a run does: sealed messages over mutual TLS, in parts of the size and as
many at once as ``engines.flower.MANNER`` says, hashed, and written to the disk at both ends.

    python benchmarks/engine_flower.py [--pairs 7] [--large 512] [--repeat 3] [--part 32 --flight 1]
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from echoes import HUB, Asker, end, found, start
from fedscan.consortium import member
from fedscan.consortium.carriers import to_sites
from fedscan.engines import flower
from fedscan.engines.doors import Knock, Lost

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
def between(folder: Path, numbers: Sequence[int]) -> Iterator[list[Asker]]:
    """fedscan over Flower, with one site: what asks it for echoes of each size."""
    folder.mkdir()
    found(folder, ["site"])
    at = f"localhost:{free_port()}"
    with to_sites("flower", member.read(folder / HUB), folder / "engine", None, at) as carrier:
        site = start(folder, "site", numbers, "flower", at)
        try:
            waiting(lambda: carrier.call("site", b"there?", 30.0))
            yield [Asker(folder, "site", n, carrier) for n in numbers]
        finally:
            end(site)


def told(what: str, ours: list[float], theirs: list[float]) -> None:
    """Prints medians, and the ratio of each pair: median, least and most."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(
        f"{what}: fedscan {statistics.median(ours):.2f} s, bare {statistics.median(theirs):.2f} s, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)",
        flush=True,
    )


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--large", type=int, default=512, help="MiB; 0 leaves it out")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--part", type=int, help="MiB of a part, in place of what the engine's own setting says")
    parser.add_argument("--flight", type=int, help="parts under way at once, in place of the same")
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = flower.MANNER
    flower.MANNER = replace(own, part=args.part * MB if args.part else own.part, flight=args.flight or own.flight)
    print(f"large messages in parts of {flower.MANNER.part / MB:g} MiB, {flower.MANNER.flight} at once", flush=True)
    turns = {MB: args.pairs, args.large * MB: args.repeat}
    sizes = [size for size in turns if size]
    with (
        tempfile.TemporaryDirectory() as temporary,
        bare(Path(temporary) / "bare") as by_itself,
        between(Path(temporary) / "relay", [size // 4 for size in sizes]) as askers,
    ):
        for size, asker in zip(sizes, askers, strict=True):
            ours, theirs = [], []
            if size == MB:
                asker.seconds()  # warms up
            for _ in range(turns[size]):
                theirs.append(by_itself(size))
                ours.append(asker.seconds())
                print(f"  bare {theirs[-1]:.2f} s, fedscan {ours[-1]:.2f} s", flush=True)
            told(f"{size / MB:g} MiB there and back", ours, theirs)


if __name__ == "__main__":
    main()
