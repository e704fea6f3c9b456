"""What fedscan's relay over NVFlare takes, against NVFlare moving the same bytes by its own means (a Collab call).

    python benchmarks/engine_nvflare.py                1 MB and 512 MB there and back, and the return after a kill
    python benchmarks/engine_nvflare.py --large 64     a smaller large one

Both systems are up at once, each with a server, two clients and mutual TLS on loopback. A turn of the relay follows
each turn of bare NVFlare, so that a machine that is slower for a while is so for both. Bare NVFlare is timed within its
job at the server, from the call until the arrays are back; the relay at `serve`'s side of its door, from the call until
the bytes are back, which `join`'s stand-in has only read and sent again.
"""

import argparse
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from fedscan.engines.doors import Door, Knock, Lost, Relayed

try:  # in NVFlare's own environment
    from nvflare.collab import CollabRecipe, collab
    from nvflare.recipe import PocEnv
except ImportError:
    collab = None

MB = 1 << 20
SITES = ("hospital-a", "hospital-b")

if collab is not None:

    @collab.publish  # type: ignore[untyped-decorator]
    def echo(arrays: list[Any]) -> list[Any]:
        """At a site: what came, again."""
        return list(arrays)

    @collab.main  # type: ignore[untyped-decorator]
    def serve() -> None:
        """At the server: moves as many arrays of 16 MB as a caller at its door wants, and says the seconds."""
        import numpy as np

        orders: queue.Queue[tuple[int, queue.Queue[float]]] = queue.Queue()

        def order(header: dict[str, Any], _: bytes) -> bytes:
            said: queue.Queue[float] = queue.Queue()
            orders.put((int(header["length"]), said))
            return json.dumps(said.get()).encode()

        door = Door(Path(collab.get_app_prop("folder", "")), order)
        while True:
            length, said = orders.get()
            if not length:
                said.put(0.0)
                break
            arrays = [np.full(min(16 * MB, length - at) // 4, at, np.float32) for at in range(0, length, 16 * MB)]
            begun = time.perf_counter()
            back = collab.clients[0](timeout=600).echo(arrays)
            said.put(time.perf_counter() - begun)
            assert sum(a.nbytes for a in back) == length
        time.sleep(1.0)
        door.close()


def bare(folder: str) -> None:
    """Starts a bare NVFlare of a server and two clients, and the job above in it; ends with the job."""
    recipe = CollabRecipe(job_name="bare", min_clients=2)
    recipe.set_server_prop("folder", folder)
    recipe.execute(PocEnv(num_clients=2)).get_result()


def stand_in(folder: str) -> None:
    """Stands in for `join`: says what it hears."""
    door = Door(Path(folder), lambda header, body: body)
    sys.stdin.read()
    door.close()


def world(folder: Path) -> dict[str, Any]:
    """A consortium of a coordinator and two sites."""
    from fedscan.consortium import coordinator, member

    coordinator.found("bench", folder / "root")
    homes = {}
    for name, role in {"hub": "coordinator", **dict.fromkeys(SITES, "site")}.items():
        homes[name] = member.begin(name, role, folder / name)
        coordinator.admit(folder / "root", folder / name / "request.csr", role)
        member.take_kit(homes[name], folder / "root" / "kits" / name)
    return homes


def eventually(call: Callable[[], bytes], seconds: float = 120.0) -> bytes:
    """What a caller gets that repeats what is lost."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Lost:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


class Relay:
    """The relay, with everything that belongs to it."""

    def __init__(self, folder: Path, port: int, stack: ExitStack) -> None:
        from fedscan.engines import nvflare

        homes = world(folder)
        self.engines = {"hub": nvflare.coordinator(homes["hub"], folder / "engine-hub", port, "localhost")}
        for name in SITES:
            door = folder / f"door-{name}"
            door.mkdir()
            told = [sys.executable, __file__, "--stand-in", str(door)]
            stack.callback(subprocess.Popen(told, stdin=subprocess.PIPE).kill)
            self.engines[name] = nvflare.site(homes[name], folder / f"engine-{name}", f"localhost:{port}", "hub", door)
        for engine in self.engines.values():
            stack.enter_context(engine)
        self.carrier = Relayed(folder / "engine-hub")
        for name in SITES:
            eventually(lambda name=name: self.carrier.call(name, b"there?", 20.0))  # type: ignore[misc]

    def move(self, length: int, part: int, flight: int, pool: ThreadPoolExecutor) -> float:
        """The seconds of that many bytes there and back in parts, of which ``flight`` are on their way at once."""
        data = os.urandom(min(length, part))
        window = threading.Semaphore(flight)

        def one(_: int) -> None:
            with window:
                assert len(eventually(lambda: self.carrier.call(SITES[0], data, 60.0))) == len(data)

        begun = time.perf_counter()
        list(pool.map(one, range(max(1, length // part))))
        return time.perf_counter() - begun

    def back_after(self, whom: str) -> tuple[float, float]:
        """The seconds from the kill of a process of NVFlare until the site is connected, and until it answers."""
        from fedscan.engines.kept import sites_connected

        os.kill(self.engines[whom].pid(), signal.SIGKILL)
        begun = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(eventually, lambda: self.carrier.call(SITES[0], b"there?", 20.0))
            hub = self.engines["hub"].folder
            while SITES[0] in sites_connected(hub):  # it takes a moment until the loss is noticed
                time.sleep(0.02)
            while SITES[0] not in sites_connected(hub):
                time.sleep(0.02)
            connected = time.perf_counter() - begun
            answer.result()
            return connected, time.perf_counter() - begun

    def most_memory(self) -> dict[str, int]:
        """The most memory (MB) that each process of NVFlare has held."""
        found = {}
        for name, engine in self.engines.items():
            status = Path(f"/proc/{engine.pid()}/status").read_text()
            found[name] = int(status.split("VmHWM:")[1].split()[0]) >> 10
        return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, to three digits."""
    told = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.3g}") for name, value in told.items()}


def end_all(folder: Path) -> None:
    """Ends every process that names the folder: bare NVFlare's supervisors start again what is ended alone."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                os.kill(int(path.parent.name), signal.SIGKILL)


def started(folder: Path) -> tuple[Knock, "subprocess.Popen[bytes]"]:
    """Bare NVFlare, started: the way to its job, and its process. On a busy machine it takes several attempts."""
    from fedscan.engines import nvflare

    for attempt in range(4):
        own = folder / f"bare-{attempt}"
        (own / "home").mkdir(parents=True)
        environment = {**os.environ, "HOME": str(own / "home"), "NVFLARE_POC_WORKSPACE": str(own / "poc")}
        told = [nvflare.python(), __file__, "--bare", str(own)]
        running = subprocess.Popen(told, env=environment, stdout=sys.stderr, cwd=own)
        while running.poll() is None:
            with suppress(Lost):
                Knock(own).call({"length": 1024}, b"", 60.0)
                return Knock(own), running
            time.sleep(0.5)
        end_all(own)
    raise SystemExit("bare NVFlare did not start")


def measured(relay: Relay, knock: Knock, asked: argparse.Namespace) -> dict[str, Any]:
    """All figures: seconds, and ratios of each turn of the relay to the turn of bare NVFlare before it."""

    def bare_seconds(length: int) -> float:
        return float(json.loads(knock.call({"length": length}, b"", 600.0)))

    figures: dict[str, Any] = {}
    with ThreadPoolExecutor(8) as pool:

        def compare(name: str, length: int, turns: int, ways: dict[str, tuple[int, int]]) -> None:
            own: list[float] = []
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            ratios: dict[str, list[float]] = {way: [] for way in ways}
            bare_seconds(length)  # warms up
            for _ in range(turns):
                for way, (part, flight) in ways.items():
                    mine, theirs = bare_seconds(length), relay.move(length, part, flight, pool)
                    own.append(mine)
                    seconds[way].append(theirs)
                    ratios[way].append(theirs / mine)
            figures[name] = {"bare seconds": spread(own)}
            figures[name] |= {w: {"seconds": spread(seconds[w]), "ratio": spread(ratios[w])} for w in ways}
            print(name, json.dumps(figures[name], indent=1), file=sys.stderr, flush=True)

        compare("1 MB", MB, asked.turns * 5, {"relay": (MB, 1)})
        ways = {f"{part} MiB, {flight} at once": (part * MB, flight) for part in asked.parts for flight in asked.flight}
        compare(f"{asked.large} MB", asked.large * MB, asked.turns, ways)
    figures["most memory (MB)"] = relay.most_memory()
    for whom in ("hub", SITES[0]):
        back = [relay.back_after(whom) for _ in range(3)]
        figures[f"kill -9 of {whom}"] = {
            "seconds until NVFlare has connected": spread([connected for connected, _ in back]),
            "seconds from then until an answer": spread([answered - connected for connected, answered in back]),
        }
    return figures


def main() -> None:
    """Measures, and prints the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--flight", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--port", type=int, default=18611)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedscan-nvflare-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        stack.callback(end_all, folder)
        knock, running = started(folder)
        relay = Relay(folder, asked.port, stack)
        try:
            print(json.dumps(measured(relay, knock, asked), indent=1))
        finally:
            with suppress(Lost):
                knock.call({"length": 0}, b"", 10.0)
            running.wait(120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare(sys.argv[2])
    elif sys.argv[1:2] == ["--stand-in"]:
        stand_in(sys.argv[2])
    else:
        main()
