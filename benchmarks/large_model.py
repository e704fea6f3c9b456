"""A large model to three hospitals and back: what the coordinator's and each hospital's process take of memory.

    python benchmarks/large_model.py --millions 300

Each in a process of its own, over doors, with keys of its own; the hospitals echo what they are sent, and the
coordinator merges the echoes. Memory is counted in models, above what the process took before its first message:
``anonymous`` is what no file backs, ``resident`` counts pages of mapped files too, which the system may take back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedscan.averaging import mean
from fedscan.consortium import coordinator, member
from fedscan.consortium.sealing import KeySeal
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Door, Doors
from fedscan.engines.envelope import Talk
from fedscan.engines.remote import Remote
from fedscan.heap import return_freed
from fedscan.method import Method, Sites, State, answer, just_weights
from fedscan.run import run
from fedscan.schema import schema_of
from fedscan.site import Splits
from fedscan.spec import Leaves
from fedscan.study import Study

TALK = Talk("a" * 64, "0" * 32, "coordinator")
LEAF = 4_000_000  # numbers in a leaf
KINDS = {"anonymous": "Anonymous", "resident": "Rss"}


class Flat(nn.Module):
    """Weights in leaves of one size."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        sizes = [LEAF] * (millions * 1_000_000 // LEAF)
        self.body = nn.ParameterList(torch.empty(n).normal_() for n in sizes)


class Task:
    """A network, and nothing to do with it."""

    def __init__(self, millions: int) -> None:
        self.networks = {"model": lambda: Flat(millions)}

    def scores(self, *_: Any) -> list[list[Any]]:
        """None."""
        return []


def study_of(millions: int, names: tuple[str, ...], rounds: int, drift: float) -> Study:
    """Asks every site for an echo, round by round; the next model is the mean of the echoes, moved by ``drift``."""

    @answer("weights", *[lambda terms: {"weights": Leaves(schema_of(terms.model))}] * 2)
    def echo(site: Any, message: Any) -> dict[str, Any]:
        return {"weights": message["weights"]}

    def round(sites: Sites, state: State) -> State:
        replies = sites.ask(echo, {"weights": state["weights"]}, need=len(names))
        merged = mean((replies[name]["weights"] for name in replies), [1 / len(replies)] * len(replies))
        for leaf in merged.values() if drift else ():
            leaf += drift
        return {"weights": merged}

    method = Method(just_weights, round, (echo,), use=lambda site, message: nn.Identity())
    nobody: Any = []
    task: Any = Task(millions)
    return Study(task, method, names, lambda name: Splits(nobody, nobody, nobody), rounds=rounds, every=0)


def memory() -> dict[str, float]:
    """Bytes of this process, by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    told = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {kind: told[name] for kind, name in KINDS.items()}


@contextmanager
def measured(millions: int, into: dict[str, Any]) -> Iterator[None]:
    """Puts the largest memory in models above what there is now into ``into``; looks every 20 ms."""
    before, most, done = memory(), dict.fromkeys(KINDS, 0.0), threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            now = memory()
            most.update({kind: max(most[kind], now[kind] - before[kind]) for kind in KINDS})

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        into.update({kind: round(most[kind] / (4e6 * millions), 2) for kind in KINDS})


def home(place: Path, name: str) -> Any:
    """A member's folder."""
    return member.read(place / name)


def be_site(place: Path, name: str, study: Study, millions: int) -> None:
    """A hospital, until its standard input is closed."""
    study.terms  # noqa: B018
    study = replace(study)
    desk = Desk(study, name, place / name / "runs", TALK, KeySeal(home(place, name), "coordinator"), durable=False)
    _ = desk.study.terms
    found: dict[str, Any] = {"who": name}
    with measured(millions, found):
        door = Door(place / name, lambda header, body: desk.handle(body))
        print("open", flush=True)
        sys.stdin.read()
        door.close()
    print(json.dumps(found), flush=True)


def be_coordinator(place: Path, study: Study, millions: int) -> None:
    """The coordinator, from the drawing of the first model to the last merge."""
    seal, carrier = KeySeal(home(place, "coordinator"), "site"), Doors({name: place / name for name in study.names})
    found: dict[str, Any] = {"who": "coordinator"}
    return_freed()
    _ = study.terms
    with measured(millions, found):
        begun = time.perf_counter()
        run(
            study,
            place / "run",
            engine=lambda study, folder: Remote(study, folder, carrier, TALK, seal, 1, durable=False),
        )
        found["seconds"] = round(time.perf_counter() - begun, 1)
    print(json.dumps(found), flush=True)


def prepare(place: Path, names: tuple[str, ...]) -> None:
    """A consortium in a folder."""
    coordinator.found("large", place / "c")
    roles = {"coordinator": "coordinator", **dict.fromkeys(names, "site")}
    begun = {name: member.begin(name, role, place / name) for name, role in roles.items()}
    for _ in range(2):  # the second time with a roster that names all of them
        kits = {n: coordinator.admit(place / "c", h.folder / "request.csr", h.role).kit for n, h in begun.items()}
    for name, one in begun.items():
        member.take_kit(one, kits[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=64)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--drift", type=float, default=0.0, help="what is added each round; 0: known by hash")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--be", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = tuple(f"site{i}" for i in range(args.sites))
    if args.be:
        study = study_of(args.millions, names, args.rounds, args.drift)
        if args.be == "coordinator":
            be_coordinator(args.place, study, args.millions)
        else:
            be_site(args.place, args.be, study, args.millions)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), names)
        words = [sys.executable, __file__, *sys.argv[1:], "--place", folder, "--be"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sites = [subprocess.Popen([*words, name], **pipes) for name in names]
        for site in sites:
            site.stdout.readline()
        done = subprocess.run([*words, "coordinator"], capture_output=True, text=True)
        print(done.stdout or done.stderr, end="")
        for site in sites:
            print(site.communicate()[0], end="")


if __name__ == "__main__":
    main()
