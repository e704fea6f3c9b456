"""Slow and broken networks: what comes through gives the same bits, and who was cut off is asked as soon as it is back.

Each site's engine reaches the coordinator's through a proxy of its own (``faultproxy``). A story is told to both
engines at once, for most of it is waiting.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from between import Between
from contract import BENCHES, study_of
from faultproxy import Proxy
from fedscan.consortium.carriers import EngineName, to_coordinator, to_sites
from fedscan.engines import flower, nvflare
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Carrier, Door, Lost
from fedscan.engines.kept import free_port
from fedscan.methods.registry import get
from fedscan.run import run
from fedscan.study import Study
from hospitals import consortium
from test_remote import record
from test_remote_kills import absent_because, without_why

SITES = ("amsterdam", "bergen", "cairo")
ALONE = threading.RLock()  # for whoever draws from torch's default generator, which is the process's
PYTHON = {"nvflare": nvflare.python, "flower": flower.python}


@dataclass
class Net:
    """Three sites, each behind a network of its own; whose desks answer is set by each test."""

    name: str
    folder: Path
    carrier: Carrier
    networks: dict[str, Proxy] = field(default_factory=dict)
    desks: dict[str, Desk] = field(default_factory=dict)
    pause: float = 0.0  # seconds that a site takes to answer
    back: dict[str, float] = field(default_factory=dict)  # site -> when its network came back
    took: dict[str, float] = field(default_factory=dict)  # site -> how many seconds later it answered

    @property
    def resets(self) -> int:
        """How many connections were reset by now."""
        return sum(network.resets for network in self.networks.values())

    def door(self, name: str, folder: Path) -> Door:
        """A site's door: behind it is its desk, or where there is none yet, somebody who says the site's name."""

        def answer(_: dict[str, Any], body: bytes) -> bytes:
            time.sleep(self.pause)
            return self.desks[name].handle(body) if name in self.desks else name.encode()

        return Door(folder, answer)

    def mend(self, name: str) -> None:
        """Brings the network of a site back."""
        self.networks[name].mend()
        self.back[name] = time.monotonic()

    def mend_later(self, name: str, seconds: float) -> None:
        """Brings the network of a site back after so many seconds."""
        timer = threading.Timer(seconds, self.mend, [name])
        timer.daemon = True
        timer.start()

    def played(self, study: Study, folder: Path, story: Mapping[int, Callable[["Net"], None]], **options: Any) -> Any:
        """The last state of a run over this net, in which something is done to it when a round begins."""
        between = Between(study, folder)
        self.desks = between.desks
        for desk in self.desks.values():
            desk.computing = ALONE  # type: ignore[assignment]

        def watch(what: str, value: Any) -> None:
            if what == "round" and value in story:
                story[value](self)
            if what == "turn" and value.turn.site in self.back and value.status == "answered":
                self.took[value.turn.site] = time.monotonic() - self.back.pop(value.turn.site)

        self.back.clear()
        self.took.clear()
        try:
            return between.run(self.carrier, run_with={"watch": watch}, **{"patience": 10.0, **options})
        finally:
            print(f"{self.name}: seconds from a network's return to the next answer: {self.took}")
            for name in SITES:
                self.networks[name].latency = 0.0
                self.networks[name].mend()
            self.pause = 0.0


def reached(net: Net) -> None:
    """Waits until the engine reaches every site."""
    net.desks = {}
    until = time.monotonic() + 120
    for name in SITES:
        said = b""
        while not said and time.monotonic() < until:
            with suppress(Lost):
                said = net.carrier.call(name, b"who is there?", 5.0)
        assert said == name.encode()


@pytest.fixture(scope="module", autouse=True)
def one_at_a_time() -> Iterator[None]:
    """Networks are made by one run at a time."""
    forked = torch.random.fork_rng

    @contextmanager
    def alone(*args: Any, **options: Any) -> Iterator[None]:
        with ALONE, forked(*args, **options):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", alone)
        yield


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Net]]:
    """A consortium for each engine that is installed."""
    with ExitStack() as stack:
        found = []
        for engine in PYTHON:
            with suppress(ValueError):
                PYTHON[engine]()
                found.append(behind_networks(engine, tmp_path_factory.mktemp(engine), stack))
        if not found:
            pytest.skip("needs an environment with NVFlare or Flower")
        for net in found:
            reached(net)
        yield found


def behind_networks(engine: EngineName, folder: Path, stack: ExitStack) -> Net:
    """A consortium over an engine, each site through a proxy."""
    homes, port = consortium(folder, *SITES, now=datetime.now(UTC)), free_port()
    carrier = stack.enter_context(to_sites(engine, homes["charite"], folder / "hub", None, f"localhost:{port}"))
    net = Net(engine, folder, carrier)
    for seed, name in enumerate(SITES):
        net.networks[name] = Proxy(port, seed)
        stack.callback(net.networks[name].close)
        stack.callback(net.door(name, folder / name).close)
        there = f"localhost:{net.networks[name].port}"
        stack.enter_context(to_coordinator(engine, homes[name], "charite", there))
    return net


def at_once(nets: list[Net], what: Callable[[Net], Any]) -> dict[str, Any]:
    """Does the same with every engine, and says what came of it."""
    with ThreadPoolExecutor(len(nets)) as pool:
        done = {net.name: pool.submit(what, net) for net in nets}
    return {name: future.result() for name, future in done.items()}


def rounds(n: int, **changes: Any) -> Study:
    return study_of(get("scaffold"), BENCHES["2D"], every=1, rounds=n, **changes)


def hold(study: Study, there: Mapping[str, Any], folder: Path) -> None:
    """Holds the runs over each engine to the same study in one process."""
    here = run(study, folder / "local")
    for name, state in there.items():
        assert toy.same(state, here), name
        assert record(folder / name / "run") == record(folder / "local"), name


@pytest.mark.slow
def test_a_slow_network_that_drops_connections_changes_no_bit(nets: list[Net], tmp_path: Path) -> None:
    study = rounds(3)

    def bad(net: Net) -> None:
        for seconds, network in zip((0.02, 0.1, 0.2), net.networks.values(), strict=True):
            network.latency = seconds
            network.flaky(3.0)

    def story(net: Net) -> Any:
        net.pause, before = 0.5, net.resets
        there = net.played(study, tmp_path / net.name, {1: bad}, lease=300.0)
        assert net.resets > before + 5
        return there

    hold(study, at_once(nets, story), tmp_path)


@pytest.mark.slow
def test_a_site_that_is_cut_off_for_longer_than_its_lease_is_absent_and_back(nets: list[Net], tmp_path: Path) -> None:
    study = rounds(3, absent="skip")
    story = {2: lambda net: net.networks["cairo"].cut(), 3: lambda net: net.mend("cairo")}
    there = at_once(nets, lambda net: net.played(study, tmp_path / net.name, story, lease=24.0))
    here = run(replace(study, silent={"cairo": (2,)}), tmp_path / "local")
    for name, state in there.items():
        assert toy.same(state, here), name
        assert without_why(tmp_path / name / "run") == without_why(tmp_path / "local"), name
        why = absent_because(tmp_path / name / "run")
        assert why
        assert all(sentence.startswith("no progress for 24 s") for sentence in why)


@pytest.mark.slow
def test_three_minutes_without_a_network_change_no_bit(nets: list[Net], tmp_path: Path) -> None:
    """Bergen's connections are closed and no new ones let in; Cairo's stay open, and carry nothing.

    In Amsterdam, what was open is dead for good, and nobody is told; new connections are let in.
    """
    study = rounds(3)

    def bad(net: Net) -> None:
        net.networks["amsterdam"].strand()
        net.back["amsterdam"] = time.monotonic()
        net.networks["bergen"].cut()
        net.networks["cairo"].deaf = True
        net.mend_later("bergen", 180.0)
        net.mend_later("cairo", 180.0)

    there = at_once(nets, lambda net: net.played(study, tmp_path / net.name, {2: bad}, lease=420.0))
    hold(study, there, tmp_path)
    for net in nets:
        assert max(net.took.values()) < 90, net.name  # seconds, not minutes, after there was a network
