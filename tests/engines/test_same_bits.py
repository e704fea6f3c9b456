"""Methods of every shape over real engines: the same state, scores and bytes as in one process."""

import socket
import time
from collections.abc import Iterator
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
from fedscan.methods.registry import get
from fedscan.run import run
from hospitals import consortium
from test_remote import METHODS, record

PYTHON = {"nvflare": nvflare.python, "flower": flower.python}

pytestmark = pytest.mark.slow


@dataclass
class Net:
    """Three sites behind a real engine; whose desks answer is set by each test."""

    carrier: Carrier
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
        here = Net(stack.enter_context(to_sites(engine, homes["charite"], folder / "hub", None, at)))
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
