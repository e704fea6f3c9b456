"""A large model to hospitals and back: what the coordinator and each hospital take of memory, their engine included.

    python benchmarks/large_model.py --millions 300 --sites 3 --engine nvflare

Each in a process of its own, with keys of its own, over an engine (or, with ``--engine loopback``, over doors); the
hospitals echo what they are sent, and the coordinator merges the echoes. Memory is counted in models, above what the
member's processes took before its first message: ``anonymous`` is what no file backs, ``resident`` counts pages of
mapped files too, which the system may take back. ``both`` is the member's own process and those of its engine at one
moment; ``own`` and ``engine`` are the peaks of each.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from echoes import HUB, behind_door, desk_of, found, study_of, talk_of
from fedscan.consortium import member
from fedscan.consortium.carriers import to_sites
from fedscan.consortium.sealing import KeySeal
from fedscan.engines import alone, kept
from fedscan.engines.remote import Remote
from fedscan.heap import return_freed
from fedscan.run import run
from fedscan.study import Study

KINDS = {"anonymous": "Anonymous", "resident": "Rss"}


def memory(process: int | str) -> dict[str, int]:
    """Bytes of a process, by kind; none where it has ended."""
    told: dict[str, int] = {}
    with suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        told = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {kind: told.get(name, 0) for kind, name in KINDS.items()}


def processes(folder: Path) -> list[int]:
    """The engine's process that holds the lock of its folder, and all that descend from it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    known: set[int] = set()
    with suppress(OSError, ValueError):
        known = {alone.holder(folder / kept.LOCK)}
    while more := {pid for pid, parent in parents.items() if parent in known} - known:
        known |= more
    return sorted(known)


def seen(folder: Path) -> dict[str, dict[str, int]]:
    """What this process takes, and its engine's."""
    engine = [memory(pid) for pid in processes(folder)]
    own = memory("self")
    return {"own": own, "engine": {kind: sum(one[kind] for one in engine) for kind in KINDS}}


@contextmanager
def measured(millions: int, folder: Path, into: dict[str, Any]) -> Iterator[None]:
    """Puts the largest memory in models above what there is now into ``into``; looks every 50 ms."""
    before, done = seen(folder), threading.Event()
    most = {whose: dict.fromkeys(KINDS, 0) for whose in ("own", "engine", "both")}

    def look() -> None:
        while not done.wait(0.05):
            now = seen(folder)
            for kind in KINDS:
                more = {whose: now[whose][kind] - before[whose][kind] for whose in before}
                more["both"] = sum(more.values())
                for whose, bytes_ in more.items():
                    most[whose][kind] = max(most[whose][kind], bytes_)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        for whose, kinds in most.items():
            into[whose] = {kind: round(most / (4e6 * millions), 2) for kind, most in kinds.items()}
        into["engine before, MB"] = before["engine"]["anonymous"] >> 20


def until(true: Callable[[], object]) -> None:
    """Waits."""
    while not true():
        time.sleep(0.2)


def be_site(place: Path, name: str, study: Study, args: argparse.Namespace) -> None:
    """A hospital, until its standard input is closed."""
    desk = desk_of(place, name, study, args.millions * 1_000_000)
    told: dict[str, Any] = {"who": name}
    folder = place / name / args.engine
    with behind_door(place, name, {desk.talk.study: desk}, args.engine, args.at):
        until(lambda: args.engine == "loopback" or (folder / kept.HEARD).exists())
        with measured(args.millions, folder, told):
            print("open", flush=True)
            sys.stdin.read()
    print(json.dumps(told), flush=True)


def be_coordinator(place: Path, study: Study, args: argparse.Namespace) -> None:
    """The coordinator, from the drawing of the first model to the last merge."""
    home = member.read(place / HUB)
    seal, talk = KeySeal(home, "site"), talk_of(args.millions * 1_000_000)
    told: dict[str, Any] = {"who": HUB}
    return_freed()
    _ = study.terms
    with to_sites(args.engine, home, place / "engine", place, args.at) as carrier:
        print("open", flush=True)
        sys.stdin.readline()

        def remote(study: Study, folder: Path) -> Remote:
            tell = lambda site, sentence: print(f"{site} {sentence}", file=sys.stderr, flush=True)  # noqa: E731
            return Remote(study, folder, carrier, talk, seal, 1, durable=False, tell=tell)

        with measured(args.millions, place / "engine", told):
            begun = time.perf_counter()
            run(study, place / "run", engine=remote)
            told["seconds"] = round(time.perf_counter() - begun, 1)
    print(json.dumps(told), flush=True)


def moved(place: Path) -> tuple[int, int]:
    """Bytes that lie at the hospitals of what comes to them in parts, and at the coordinator of what comes back."""
    sizes = []
    for pattern in ("*/runs/*/*/incoming/*", "run/answers/*"):
        sizes.append(0)
        for path in place.glob(pattern):
            with suppress(OSError):
                sizes[-1] += path.stat().st_size
    return sizes[0], sizes[1]


def watch(place: Path, total: int, done: threading.Event) -> None:
    """Says every 10 seconds how far it is."""
    begun = time.monotonic()
    while not done.wait(10.0):
        down, up = moved(place)
        shares = f"{100 * down / total:.0f} % has come to the hospitals, {100 * up / total:.0f} % is back"
        print(f"{time.monotonic() - begun:.0f} s: {shares}", file=sys.stderr, flush=True)


def carried_out(place: Path, names: tuple[str, ...], words: list[str], total: int) -> None:
    """Starts all members, and prints what they have measured."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([*words, name], **pipes) for name in (HUB, *names)}
    over = threading.Event()
    try:
        for process in running.values():
            assert process.stdout is not None
            process.stdout.readline()
        threading.Thread(target=watch, args=(place, total, over), daemon=True).start()
        for process in running.values():  # the coordinator first: the hospitals' engines end once it is done
            print(process.communicate("go\n" if process is running[HUB] else "")[0], end="", flush=True)
    finally:
        over.set()
        for process in running.values():
            process.kill()


def free_port() -> int:
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=64, help="of numbers of four bytes in the model")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--drift", type=float, default=0.0, help="what is added each round; 0: known by hash")
    parser.add_argument("--engine", choices=["loopback", "nvflare", "flower"], default="nvflare")
    parser.add_argument("--at", default="", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--be", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = tuple(f"site{i}" for i in range(args.sites))
    if args.be:
        study = study_of(args.millions * 1_000_000, names, args.rounds, args.drift)
        be_coordinator(args.place, study, args) if args.be == HUB else be_site(args.place, args.be, study, args)
        return
    with tempfile.TemporaryDirectory(prefix="fedscan-large-") as folder:
        place = Path(folder)
        found(place, names)
        words = [sys.executable, __file__, *sys.argv[1:], "--at", f"localhost:{free_port()}", "--place", folder, "--be"]
        carried_out(place, names, words, args.sites * args.millions * 4_000_000)


if __name__ == "__main__":
    main()
