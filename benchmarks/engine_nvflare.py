"""What fedscan takes over NVFlare, against NVFlare moving the same bytes by its own means (a Collab call).

    python benchmarks/engine_nvflare.py                1 MB and 512 MB there and back, and the return after a kill
    python benchmarks/engine_nvflare.py --large 64     a smaller large one

Both systems are up at once, each with a server, two clients and mutual TLS on loopback. A turn of fedscan follows each
turn of bare NVFlare, so that a machine that is slower for a while is so for both. Bare NVFlare is timed within its job
at the server, from the call until the arrays are back; fedscan from the question of an echo until its answer is on the
coordinator's disk: sealed messages, in parts of the size and as many at once as ``engines.nvflare.MANNER`` says, hashed
and written to the disk at both ends.
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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedscan.engines.doors import Door, Knock, Lost

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


class Between:
    """fedscan over NVFlare, with all that belongs to it: sites of their own that echo, and what asks the first."""

    def __init__(self, folder: Path, sizes: Sequence[int], port: int, stack: ExitStack) -> None:
        import echoes
        from fedscan.consortium import member
        from fedscan.consortium.carriers import to_sites
        from fedscan.engines import nvflare

        folder.mkdir()
        echoes.found(folder, SITES)
        at, numbers = f"localhost:{port}", [size // 4 for size in sizes]
        hub = member.read(folder / echoes.HUB)
        self.carrier = stack.enter_context(to_sites("nvflare", hub, folder / "engine", None, at))
        for name in SITES:
            stack.callback(echoes.end, echoes.start(folder, name, numbers, "nvflare", at))
        self.engines = {"hub": nvflare.Engine(folder / "engine")}
        self.engines |= {name: nvflare.Engine(folder / name / "nvflare") for name in SITES}
        for name in SITES:
            eventually(lambda name=name: self.carrier.call(name, b"there?", 20.0))  # type: ignore[misc]
        self.askers = {n * 4: echoes.Asker(folder, SITES[0], n, self.carrier) for n in numbers}

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


def measured(between: Between, knock: Knock, asked: argparse.Namespace) -> dict[str, Any]:
    """All figures: seconds, and ratios of each turn of fedscan to the turn of bare NVFlare before it."""

    def bare_seconds(length: int) -> float:
        return float(json.loads(knock.call({"length": length}, b"", 600.0)))

    figures: dict[str, Any] = {}
    for name, length, turns in (("1 MB", MB, asked.turns * 5), (f"{asked.large} MB", asked.large * MB, asked.turns)):
        asker = between.askers[length]
        bare_seconds(length)  # warms up
        asker.seconds()
        mine, theirs = [], []
        for _ in range(turns):
            theirs.append(bare_seconds(length))
            mine.append(asker.seconds())
            print(f"{name}: bare {theirs[-1]:.2f} s, fedscan {mine[-1]:.2f} s", file=sys.stderr, flush=True)
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        figures[name] = {"bare seconds": spread(theirs), "fedscan seconds": spread(mine), "ratio": spread(ratios)}
    figures["most memory (MB)"] = between.most_memory()
    for whom in ("hub", SITES[0]):
        back = [between.back_after(whom) for _ in range(3)]
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
    parser.add_argument("--part", type=int, help="MiB of a part, in place of what the engine's own setting says")
    parser.add_argument("--flight", type=int, help="parts under way at once, in place of the same")
    parser.add_argument("--port", type=int, default=18611)
    asked = parser.parse_args()
    from fedscan.engines import nvflare

    own = nvflare.MANNER
    nvflare.MANNER = replace(own, part=asked.part * MB if asked.part else own.part, flight=asked.flight or own.flight)
    with tempfile.TemporaryDirectory(prefix="fedscan-nvflare-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        stack.callback(end_all, folder)
        knock, running = started(folder)
        between = Between(folder / "relay", [MB, asked.large * MB], asked.port, stack)
        try:
            figures = {"MiB of a part": nvflare.MANNER.part / MB, "parts at once": nvflare.MANNER.flight}
            print(json.dumps(figures | measured(between, knock, asked), indent=1))
        finally:
            with suppress(Lost):
                knock.call({"length": 0}, b"", 10.0)
            running.wait(120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare(sys.argv[2])
    else:
        main()
