"""Methods of every shape over real engines: the same state, scores and bytes as in one process."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import toy
from between import Between
from contract import BENCHES, study_of
from fedscan.consortium.carriers import EngineName, to_coordinator, to_sites
from fedscan.engines import flower, nvflare
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Carrier, Door, Lost
from fedscan.engines.local import Replay
from fedscan.methods.registry import get
from fedscan.run import run
from hospitals import consortium
from test_remote import METHODS, order_in, record
from test_resume import Killed

PYTHON = {"nvflare": nvflare.python, "flower": flower.python}

pytestmark = pytest.mark.slow


@dataclass
class Net:
    """Three sites behind a real engine; whose desks answer is set by each test."""

    carrier: Carrier
    folder: Path
    desks: dict[str, Desk] = field(default_factory=dict)


@pytest.fixture(scope="module", params=["nvflare", "flower"])
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    engine: EngineName = request.param
    try:
        PYTHON[engine]()
    except ValueError as e:
        pytest.skip(str(e))
    folder = tmp_path_factory.mktemp(engine)
    homes = consortium(folder, *toy.NAMES, now=datetime.now(UTC))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        at = f"localhost:{listening.getsockname()[1]}"
    with ExitStack() as stack:
        here = Net(stack.enter_context(to_sites(engine, homes["charite"], folder / "hub", None, at)), folder)
        for name in toy.NAMES:
            stack.callback(opened(here, name, folder / name).close)
            stack.enter_context(to_coordinator(engine, homes[name], "charite", at))
        reached(here.carrier)
        yield here


def opened(net: Net, name: str, folder: Path) -> Door:
    """A site's door: behind it is its desk, or where there is none yet, somebody who says the site's name."""
    return Door(folder, lambda header, body: net.desks[name].handle(body) if name in net.desks else name.encode())


def reached(carrier: Carrier) -> None:
    """Waits until the engine reaches every site."""
    until = time.monotonic() + 120
    for name in toy.NAMES:
        said = b""
        while not said and time.monotonic() < until:
            with suppress(Lost):
                said = carrier.call(name, b"who is there?", 5.0)
        assert said == name.encode()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_bits_over_an_engine(name: str, net: Net, tmp_path: Path) -> None:
    study = study_of(get(name), BENCHES["3D batch"], every=1)
    between = Between(study, tmp_path)
    net.desks = between.desks
    there: dict[str, Any] = between.run(net.carrier, lease=120.0)
    assert toy.same(there, run(study, tmp_path / "local"))
    assert record(tmp_path / "run") == record(tmp_path / "local")


class Slow:
    """A desk that thinks before it says anything."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def handle(self, body: bytes) -> bytes:
        time.sleep(0.5)
        return self.desk.handle(body)


def test_an_asynchronous_method_gives_the_same_bits_in_the_order_in_which_answers_came(
    net: Net, tmp_path: Path
) -> None:
    study = study_of(get("fedasync"), BENCHES["2D"], every=2, rounds=4)
    between = Between(study, tmp_path)
    slow: Any = Slow(between.desks["cairo"])
    net.desks = {**between.desks, "cairo": slow}
    there = between.run(net.carrier, lease=120.0)
    order = order_in(tmp_path / "run")
    assert len({turn.site for turn in order}) == 3
    assert toy.same(there, run(study, tmp_path / "local", engine=lambda s, f: Replay(s, f, order)))
    assert record(tmp_path / "run") == record(tmp_path / "local")


class Killing:
    """A carrier beside which something is killed, each time that so many more requests were carried."""

    def __init__(self, carrier: Carrier, every: int, kills: list[Callable[[], None]]) -> None:
        self.carrier, self.manner, self.every, self.kills = carrier, carrier.manner, every, kills
        self.calls, self.killed, self._lock = 0, 0, threading.Lock()

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        with self._lock:
            self.calls += 1
            if self.calls % self.every == 0 and self.killed < len(self.kills):
                self.kills[self.killed]()
                self.killed += 1
        return self.carrier.call(site, request, seconds)


def kill_engine(folder: Path) -> None:
    """kill -9 for every process that a member's engine consists of."""
    found = [pid for pid in os.listdir("/proc") if pid.isdecimal() and str(folder) in told(pid)]
    assert found, f"no process works for {folder}"
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def told(pid: str) -> str:
    """What a process was started with; nothing of this one."""
    try:
        words = Path("/proc", pid, "cmdline").read_bytes() + Path("/proc", pid, "environ").read_bytes()
    except OSError:
        return ""
    return "" if int(pid) == os.getpid() else words.decode(errors="replace")


def test_a_run_goes_on_when_engines_and_sites_are_killed(net: Net, tmp_path: Path) -> None:
    study = study_of(get("scaffold"), BENCHES["2D"], every=1, rounds=4)
    computed: list[str] = []
    between = Between(study, tmp_path, event=lambda seen: computed.append(seen) if "computed" in seen else None)
    net.desks = between.desks
    engine = net.folder / "hub"
    kills = [
        lambda: kill_engine(engine),
        lambda: kill_engine(net.folder / "amsterdam"),
        lambda: between.restart("bergen"),
        lambda: kill_engine(net.folder / "cairo"),
        lambda: kill_engine(engine),
        lambda: between.restart("amsterdam"),
    ]
    carrier = Killing(net.carrier, 5, kills)
    killed_at = iter(["closed 1.0", "closed 2.1"])

    def run_on(resume: bool) -> Any:
        event = next(killed_at, "")

        def kill(seen: str) -> None:
            if seen == event:
                raise Killed(event)

        return between.run(carrier, resume=resume, run_with={"event": kill}, lease=300.0)

    for resume in (False, True):
        with pytest.raises(Killed):
            run_on(resume)
    there = run_on(True)
    assert carrier.killed == len(kills)
    assert toy.same(there, run(study, tmp_path / "local"))
    assert record(tmp_path / "run") == record(tmp_path / "local")
    again = len(computed) - len(set(computed))
    assert again <= 2  # what a site had not kept when it was restarted; nothing else is computed twice
