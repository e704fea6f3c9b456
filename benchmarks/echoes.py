"""Hospitals that echo what they are sent, each in a process of its own, over any engine: for figures of large messages.

What moves is what a run of fedscan moves, by its own engine (``engines.remote``, ``engines.desk``): sealed messages, in
parts of the size and as many at once as the carrier says, each hashed, and written to the disk before it counts.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedscan import wire
from fedscan.averaging import mean
from fedscan.consortium import coordinator, member
from fedscan.consortium.carriers import EngineName, to_coordinator
from fedscan.consortium.sealing import KeySeal
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Carrier, Door
from fedscan.engines.envelope import Talk
from fedscan.engines.remote import Remote
from fedscan.method import Method, Sites, State, answer, just_weights
from fedscan.recorded import Letter
from fedscan.schema import Weights, schema_of
from fedscan.site import Splits
from fedscan.spec import Leaves
from fedscan.study import Study, Turn

LEAF = 4_000_000  # numbers in a leaf
ROUNDS = 1000
HUB = "coordinator"


class Flat(nn.Module):
    """So many weights, in leaves of one size."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        sizes = [min(LEAF, numbers - at) for at in range(0, numbers, LEAF)]
        self.body = nn.ParameterList(torch.empty(n).normal_() for n in sizes)


class Task:
    """A network, and nothing to do with it."""

    def __init__(self, numbers: int) -> None:
        self.networks = {"model": lambda: Flat(numbers)}

    def scores(self, *_: Any) -> list[list[Any]]:
        """None."""
        return []


def study_of(numbers: int, names: tuple[str, ...], rounds: int = ROUNDS, drift: float = 0.0) -> Study:
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
    task: Any = Task(numbers)
    return Study(task, method, names, lambda name: Splits(nobody, nobody, nobody), rounds=rounds, every=0)


def talk_of(numbers: int) -> Talk:
    """By what a study of that size is known."""
    return Talk(f"{numbers:064x}", "0" * 32, HUB)


def found(place: Path, names: Sequence[str]) -> None:
    """A consortium in a folder: a coordinator, and sites of these names."""
    coordinator.found("echoes", place / "c")
    roles = {HUB: HUB, **dict.fromkeys(names, "site")}
    begun = {name: member.begin(name, role, place / name) for name, role in roles.items()}
    for _ in range(2):  # the second time with a roster that names all of them
        kits = {n: coordinator.admit(place / "c", h.folder / "request.csr", h.role).kit for n, h in begun.items()}
    for name, one in begun.items():
        member.take_kit(one, kits[name])


def desk_of(place: Path, name: str, study: Study, numbers: int) -> Desk:
    """A site's end of the study."""
    _ = study.terms
    seal = KeySeal(member.read(place / name), HUB)
    return Desk(study, name, place / name / "runs" / str(numbers), talk_of(numbers), seal, durable=False)


@contextmanager
def behind_door(place: Path, name: str, desks: dict[str, Desk], engine: EngineName, at: str) -> Iterator[None]:
    """A site that answers by its desks, which are named by the hash of their study."""

    def answer(_: dict[str, Any], body: bytes) -> bytes:
        text = bytes(body[4 : 4 + int.from_bytes(body[:4], "big")])
        return next((desk for study, desk in desks.items() if study.encode() in text), first).handle(body)

    first, door = next(iter(desks.values())), Door(place / name, answer)
    try:
        with to_coordinator(engine, member.read(place / name), HUB, at):
            yield
    finally:
        door.close()


def be_site(place: Path, name: str, numbers: Sequence[int], engine: EngineName, at: str) -> None:
    """A site of studies of these sizes, until its standard input is closed."""
    desks = {talk_of(n).study: desk_of(place, name, study_of(n, (name,)), n) for n in numbers}
    with behind_door(place, name, desks, engine, at):
        print("open", flush=True)
        sys.stdin.read()


class Asker:
    """Asks one site for echoes of so many numbers, as a run does."""

    def __init__(self, place: Path, site: str, numbers: int, carrier: Carrier) -> None:
        study, seal = study_of(numbers, (site,)), KeySeal(member.read(place / HUB), "site")
        folder = place / "asked" / str(numbers)
        self.remote = Remote(study, folder, carrier, talk_of(numbers), seal, 1, durable=False)
        self.site, self.numbers, self.round = site, numbers, 0

    def seconds(self) -> float:
        """How long one echo of new weights takes: from the message's being ready to the answer's being on the disk."""
        self.round += 1
        flat = Flat(self.numbers)
        weights = Weights({name: leaf.detach() for name, leaf in flat.named_parameters()})
        message = {"weights": weights}
        letter = Letter(Turn(self.round, 0, self.site), "echo", message, wire.pack(message), None)
        begun = time.perf_counter()
        self.remote.send([letter])
        answer = self.remote.receive(False)
        seconds = time.perf_counter() - begun
        if answer.absent or answer.refused:
            raise RuntimeError(answer.absent or answer.refused)
        back = answer.read()["weights"]
        assert all(torch.equal(back[name], leaf) for name, leaf in weights.items())
        self.remote.settle(lambda name: ())
        return seconds


def start(place: Path, name: str, numbers: Sequence[int], engine: EngineName, at: str) -> "subprocess.Popen[bytes]":
    """Starts a site as a process of its own."""
    words = [sys.executable, __file__, str(place), name, engine, at, *map(str, numbers)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a site, and its engine with it."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("name")
    parser.add_argument("engine")
    parser.add_argument("at")
    parser.add_argument("numbers", type=int, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    be_site(args.place, args.name, args.numbers, args.engine, args.at)
